//! Named partitions on the disk.
