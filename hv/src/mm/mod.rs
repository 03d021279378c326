//! What joins `vmobject` and `stage2` to the metal: adapters, and the heap.

pub mod store;
