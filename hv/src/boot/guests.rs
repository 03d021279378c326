//! What runs first: the manifest on the disk says, and here it is made.
//!
//! Called once, on the first CPU, when everything below works. A guest that cannot be made is told of and
//! left out; in batch mode that is a failure of the whole.

use super::machine::Machine;
use crate::arch::{id, timer};
use crate::guest::family::Birth;
use crate::guest::snapshot;
use crate::guest::{self, Guest, create, stored, table};
use crate::loader::image::HEAD;
use crate::loader::manifest::{self, Stored, SwapPlace};
use crate::loader::plan::Blob;
use crate::loader::{GuestConfig, Manifest};
use crate::mm;
use crate::monitor::{configure, host};
use crate::sched;
use ::log::{error, info, warn};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use arrayvec::ArrayVec;
use board::platform::{MAX_SEED, Platform};
use hv_abi::manifest::SWAP_PARTITION;
use vmobject::charge::Overcommit;
use vmobject::lock::Held;

/// Makes and starts every guest of the manifest.
pub(super) fn start(machine: &'static Machine, held: &mut Held<'_, 0>) {
    if sched::reserve(guest::MAX_VCPUS, held).is_err() {
        panic!("no memory for the run queues");
    }
    let Some(manifest) = read() else {
        warn!("there is no manifest on any disk: nothing to run");
        return;
    };
    swap(&manifest, held);
    if manifest.batch {
        host::leave_with_the_last_guest();
    }
    if let Some(first) = manifest.guests.first() {
        configure::set_model(first);
    }
    create::set_images(images(&manifest));
    let mut failed = false;
    for disk in &manifest.stored {
        failed |= !attach(disk, machine, held);
    }
    for config in manifest.guests {
        failed |= !launch(config, machine, held);
    }
    if failed && manifest.batch {
        error!("not every guest could be made");
        crate::arch::power::exit(1);
    }
}

/// Gives the memory manager its swap, and says how much may be kept of images and how much promised.
fn swap(manifest: &Manifest, held: &mut Held<'_, 0>) {
    let alone = [SwapPlace { name: SWAP_PARTITION.to_string(), is_disk: false, priority: None }];
    let given = if manifest.swap.is_empty() { &alone[..] } else { &manifest.swap };
    // As swapon counts those that are given none.
    let mut default = -2;
    for SwapPlace { name, is_disk, priority } in given {
        let disks = is_disk.then(|| mm::disks().find_swap(name)).into_iter().flatten();
        let partition = (!is_disk).then(|| mm::disks().find(name)).flatten();
        let mut stores = disks.chain(partition).peekable();
        if stores.peek().is_none() && !manifest.swap.is_empty() {
            warn!("\"{name}\" has no room to swap to");
        }
        for store in stores {
            let priority = priority.map_or(default, i32::from);
            match mm::vm().add_swap_at(store, priority, held) {
                Ok(pages) => info!("swap: {} MiB on \"{name}\", priority {priority}", pages >> 8),
                Err(error) => warn!("\"{name}\" cannot be swapped to: {error:?}"),
            }
        }
        default -= i32::from(priority.is_none());
    }
    // What nobody uses goes before what guests do; half is left for those who come.
    let frames = mm::vm().memory(held).total;
    mm::vm().set_cache_limit(frames / 2, held);
    if let Some(percent) = manifest.overcommit {
        mm::vm().set_overcommit(Overcommit::Percent(percent), held);
    }
    if let Some(seconds) = manifest.disk_patience {
        mm::disks().set_patience(seconds);
    }
}

/// Looks what is stored on a disk; the guest goes on if that is asked for.
fn attach(disk: &Stored, machine: &'static Machine, held: &mut Held<'_, 0>) -> bool {
    let name = &disk.name;
    if let Err(error) = stored::attach(name, &disk.id, held) {
        error!("stored guest \"{name}\": {error}");
        return !disk.resume;
    }
    if !disk.resume {
        return true;
    }
    match go_on(name, machine, held) {
        Ok(guest) => started(guest, held),
        Err(error) => {
            error!("stored guest \"{name}\": {error}");
            false
        }
    }
}

/// Makes a stored guest that goes on where it was.
fn go_on(name: &str, machine: &'static Machine, held: &mut Held<'_, 0>) -> Result<Arc<Guest>, String> {
    let id = table::next_id();
    let moment = stored::moment(name, id, held).map_err(|error| error.to_string())?;
    let config = moment.config().clone();
    // The name is the image's; who is meant by a number, or by a name that is there, is not its to say.
    let taken = table::find(&config.name, held).is_some() || config.name.parse::<u32>().is_ok();
    let own = if taken { format!("{name}.{id}") } else { config.name };
    let poll = |held: &mut Held<'_, 0>| sched::Outside::poll(machine, held);
    let birth = Birth::first(config.grant_fork);
    snapshot::make(&moment, id, own, birth, &poll, held).map_err(|error| error.to_string())
}

/// Lets a new guest run; the first is attached to the console.
fn started(guest: Arc<Guest>, held: &mut Held<'_, 0>) -> bool {
    let (id, vcpus, mib) = (guest.id, guest.vcpus.len(), guest.config.memory >> 20);
    info!("guest {id} \"{}\": {vcpus} vCPUs, {mib} MiB", guest.name());
    if guest::console::attached().is_none() {
        guest::console::attach(Some(id));
    }
    sched::launch(guest, held)
}

/// Makes and starts one guest.
fn launch(config: GuestConfig, machine: &'static Machine, held: &mut Held<'_, 0>) -> bool {
    let (id, name) = (table::next_id(), config.name.clone());
    let poll = |held: &mut Held<'_, 0>| sched::Outside::poll(machine, held);
    match create::create(id, config, None, &poll, held) {
        Ok(guest) => started(guest, held),
        Err(error) => {
            error!("guest {id} \"{name}\": {error}");
            false
        }
    }
}

/// Seeds the machine's generator with `entropy`, the loader's random words, and with whatever else differs from
/// boot to boot. No copy of the words stays here.
pub(super) fn seed(platform: &Platform, mut entropy: ArrayVec<u64, MAX_SEED>, held: &mut Held<'_, 0>) {
    if entropy.is_empty() {
        warn!("the loader gives no random seed: guests' random numbers can be guessed");
    }
    let mut words = vec![timer::now(), id::read().midr];
    words.extend(&entropy);
    for chunk in platform.bootargs.as_bytes().chunks(8) {
        let mut word = [0; 8];
        for (to, &from) in word.iter_mut().zip(chunk) {
            *to = from;
        }
        words.push(u64::from_le_bytes(word));
    }
    create::seed(&words, held);
    words.fill(0);
    entropy.fill(0);
    // Looked at, so that the zeros are written.
    core::hint::black_box((&words, &entropy));
}

/// Reads the manifest's partition.
fn read() -> Option<Manifest> {
    let store = mm::disks().find(hv_abi::manifest::PARTITION)?;
    let bytes = usize::try_from(mm::disks().bytes(store)).unwrap_or(usize::MAX).min(hv_abi::manifest::LIMIT);
    let mut text = vec![0; bytes];
    if let Err(error) = mm::disks().read_now(store, 0, &mut text) {
        error!("the manifest cannot be read: {error:?}");
        return None;
    }
    match manifest::parse(&text) {
        Ok(manifest) => Some(manifest),
        Err(error) => {
            error!("{error}");
            None
        }
    }
}

/// Every partition that a guest could be made from, with its first page.
fn images(manifest: &Manifest) -> Vec<create::Image> {
    let mut images = Vec::new();
    for (store, name) in mm::disks().partitions() {
        let swapped_to = manifest.swap.iter().any(|place| !place.is_disk && place.name == name);
        if swapped_to || name == hv_abi::manifest::PARTITION || name == SWAP_PARTITION {
            continue;
        }
        let bytes = manifest.bytes_of(name).unwrap_or_else(|| mm::disks().bytes(store));
        let mut head = vec![0; usize::try_from(bytes).unwrap_or(HEAD).min(HEAD)];
        match mm::disks().read_now(store, 0, &mut head) {
            Ok(()) => {
                images.push(create::Image { name: name.to_string(), blob: Blob { store, bytes }, head })
            }
            Err(error) => warn!("partition \"{name}\" cannot be read: {error:?}"),
        }
    }
    images
}
