//! What a guest asks of EL2 by HVC or SMC: function numbers and answers of PSCI and SMCCC.
//!
//! The standard's numbers are as Arm gives them. The vendor's range is ours: `0x86..` is a fast call of
//! "vendor specific hypervisor services", and the functions below `0x100` of it exist on any build.

/// PSCI, with the 64-bit numbers where both exist.
pub mod psci {
    /// PSCI_VERSION.
    pub const VERSION: u32 = 0x8400_0000;
    /// CPU_SUSPEND.
    pub const CPU_SUSPEND: u32 = 0xc400_0001;
    /// CPU_OFF.
    pub const CPU_OFF: u32 = 0x8400_0002;
    /// CPU_ON.
    pub const CPU_ON: u32 = 0xc400_0003;
    /// AFFINITY_INFO.
    pub const AFFINITY_INFO: u32 = 0xc400_0004;
    /// MIGRATE. Never offered; the tree of old has a number for it.
    pub const MIGRATE: u32 = 0xc400_0005;
    /// MIGRATE_INFO_TYPE.
    pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    /// SYSTEM_OFF.
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    /// SYSTEM_RESET.
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
    /// PSCI_FEATURES.
    pub const FEATURES: u32 = 0x8400_000a;
}

/// The calling convention itself.
pub mod smccc {
    /// SMCCC_VERSION.
    pub const VERSION: u32 = 0x8000_0000;
    /// SMCCC_ARCH_FEATURES.
    pub const ARCH_FEATURES: u32 = 0x8000_0001;
    /// The UID of the vendor's hypervisor services.
    pub const VENDOR_UID: u32 = 0x8600_ff01;
    /// Their revision.
    pub const VENDOR_REVISION: u32 = 0x8600_ff03;
    /// What the UID call answers in W0 to W3: 128 bits, made up once.
    pub const UID: [u32; 4] = [0x1f63_b08e, 0x4b97_c2d1, 0x7ea5_50a9, 0xd2e4_9c16];
}

/// Our vendor's services, all of the 64-bit convention. An answer's status is in X0, as [`status`] has it.
pub mod vendor {
    /// Who am I: X1 is the guest's number, X2 its place in the fork that made it (0 in one that was not
    /// forked), X3 how many children that fork made.
    pub const IDENTITY: u32 = 0xc600_0001;
    /// Fork me: X1 is how many children. All go on from here: X1 is 0 in the parent and the child's place,
    /// from 1 on, in a child; X2 how many children there are; X3 the guest's own number. DENIED to a guest
    /// that was not granted that many, or that forks too often.
    pub const FORK: u32 = 0xc600_0002;
}

/// A fast call in nobody's range, answered NOT_SUPPORTED: what measures the way through EL2. The number is
/// the one that other hypervisors are measured by.
pub const NULL: u32 = 0x4b00_0000;
/// A number in our vendor range that no function will ever have: tests ask for it.
pub const NEVER: u32 = 0x8600_00fe;

/// Answers, as X0 holds them.
pub mod status {
    /// It is done.
    pub const SUCCESS: i64 = 0;
    /// Nobody knows that number.
    pub const NOT_SUPPORTED: i64 = -1;
    /// An argument is wrong.
    pub const INVALID_PARAMETERS: i64 = -2;
    /// Allowed never, or not now.
    pub const DENIED: i64 = -3;
    /// The CPU runs already.
    pub const ALREADY_ON: i64 = -4;
    /// The CPU is on its way.
    pub const ON_PENDING: i64 = -5;
}
