//! A virtio device in memory, for tests: a transport that remembers where its queues are.
