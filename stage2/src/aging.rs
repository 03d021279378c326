//! Looking at what pages were used and written, without unmapping them.
//!
//! The access flag is cleared, so that the hardware sets it again or, where it does not, the guest faults
//! and `enter` does. Dirty state moves out of a leaf only where the hardware can put it back: elsewhere a
//! writable leaf says "dirty" every time, and becomes clean by being protected. The caches are told, since
//! a cached leaf is used without its flags being looked at.

use crate::table::TableSource;
use crate::tlb::{Batch, TlbOps};
use crate::tree::Stage2;
use vmobject::addr::IpaRange;
use vmobject::pmap::Sink;
use vmobject::prot::Prot;

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Ages every leaf that maps part of a range; a leaf below a parked entry is write-protected with it.
    pub(crate) fn age_range(&self, range: IpaRange, sink: Sink<'_>) {
        let mut batch = Batch::new();
        self.visit(range, |spot| {
            if spot.parked {
                let to = |leaf: crate::descriptor::Descriptor| leaf.aged().restricted(Prot::READ_EXECUTE);
                self.change(spot, to, &mut batch, &mut *sink);
            } else {
                self.change(spot, crate::descriptor::Descriptor::aged, &mut batch, &mut *sink);
            }
        });
        self.flush(batch);
    }
}
