//! PSCI 1.1: what a guest asks of its machine's power controller.
//!
//! [`call`] turns registers into a [`Request`] or an answer; nothing here knows a vCPU. `hypercall`
//! carries the requests out, because they reach other vCPUs and the guest as a whole.

/// Function numbers, without the 64-bit flag.
pub mod function {
    /// The flag of the 64-bit convention.
    pub const SMC64: u32 = 1 << 30;
    /// PSCI_VERSION.
    pub const VERSION: u32 = 0x8400_0000;
    /// CPU_SUSPEND.
    pub const CPU_SUSPEND: u32 = 0x8400_0001;
    /// CPU_OFF.
    pub const CPU_OFF: u32 = 0x8400_0002;
    /// CPU_ON.
    pub const CPU_ON: u32 = 0x8400_0003;
    /// AFFINITY_INFO.
    pub const AFFINITY_INFO: u32 = 0x8400_0004;
    /// MIGRATE_INFO_TYPE.
    pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    /// SYSTEM_OFF.
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    /// SYSTEM_RESET.
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
    /// PSCI_FEATURES.
    pub const FEATURES: u32 = 0x8400_000a;
    /// SYSTEM_RESET2.
    pub const SYSTEM_RESET2: u32 = 0x8400_0012;
}

/// Return codes, as the 64-bit register holds them.
pub mod code {
    use hv_abi::call::status;

    /// SUCCESS.
    pub const SUCCESS: u64 = status::SUCCESS.cast_unsigned();
    /// NOT_SUPPORTED.
    pub const NOT_SUPPORTED: u64 = status::NOT_SUPPORTED.cast_unsigned();
    /// INVALID_PARAMETERS.
    pub const INVALID_PARAMETERS: u64 = status::INVALID_PARAMETERS.cast_unsigned();
    /// DENIED.
    pub const DENIED: u64 = status::DENIED.cast_unsigned();
    /// ALREADY_ON.
    pub const ALREADY_ON: u64 = status::ALREADY_ON.cast_unsigned();
    /// ON_PENDING.
    pub const ON_PENDING: u64 = status::ON_PENDING.cast_unsigned();
    /// INVALID_ADDRESS.
    pub const INVALID_ADDRESS: u64 = -9i64 as u64;
}

/// The version we speak: 1.1.
pub const VERSION: u64 = 0x1_0001;
/// MIGRATE_INFO_TYPE: there is no trusted system that would need migrating.
const NO_TRUSTED_OS: u64 = 2;

/// What is left to do after a call was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing: the answer goes into X0.
    Answer(u64),
    /// Wait for an interrupt, then answer success.
    Suspend,
    /// Switch the calling vCPU off. Does not return to the guest.
    CpuOff,
    /// Switch another vCPU on.
    CpuOn {
        /// Its affinity.
        target: u64,
        /// Where it starts.
        entry: u64,
        /// Its X0.
        context: u64,
    },
    /// Say whether a vCPU is on.
    AffinityInfo {
        /// Its affinity.
        target: u64,
    },
    /// The guest ends.
    SystemOff,
    /// The guest starts anew.
    SystemReset,
}

/// Understands a call; `None` when the number is not one of PSCI's.
pub fn call(number: u32, arguments: [u64; 3]) -> Option<Request> {
    let wide = number & function::SMC64 != 0;
    let [a, b, c] = arguments.map(|argument| if wide { argument } else { argument & 0xffff_ffff });
    // Only calls that carry addresses or affinities have a 64-bit form.
    let has_wide_form = matches!(
        number & !function::SMC64,
        function::CPU_SUSPEND | function::CPU_ON | function::AFFINITY_INFO | function::SYSTEM_RESET2
    );
    if wide && !has_wide_form {
        return None;
    }
    let request = match number & !function::SMC64 {
        function::VERSION => Request::Answer(VERSION),
        // Every state is a standby state to us: a power-down request may be answered by standing by.
        function::CPU_SUSPEND => Request::Suspend,
        function::CPU_OFF => Request::CpuOff,
        function::CPU_ON => Request::CpuOn { target: a, entry: b, context: c },
        function::AFFINITY_INFO if b == 0 => Request::AffinityInfo { target: a },
        // Higher affinity levels may be refused since PSCI 1.0.
        function::AFFINITY_INFO => Request::Answer(code::INVALID_PARAMETERS),
        function::MIGRATE_INFO_TYPE => Request::Answer(NO_TRUSTED_OS),
        function::SYSTEM_OFF => Request::SystemOff,
        function::SYSTEM_RESET => Request::SystemReset,
        // Only the architectural warm reset, type 0, exists.
        function::SYSTEM_RESET2 if a & 0xffff_ffff == 0 => Request::SystemReset,
        function::SYSTEM_RESET2 => Request::Answer(code::INVALID_PARAMETERS),
        function::FEATURES => Request::Answer(features(a & 0xffff_ffff)),
        _ => return None,
    };
    Some(request)
}

fn features(asked: u64) -> u64 {
    let Ok(asked) = u32::try_from(asked) else { return code::NOT_SUPPORTED };
    if asked == super::smccc::VERSION_FUNCTION {
        return code::SUCCESS;
    }
    if asked & !function::SMC64 == function::FEATURES && asked & function::SMC64 != 0 {
        return code::NOT_SUPPORTED;
    }
    // CPU_SUSPEND's flags are zero: original format of the power state, no OS-initiated mode.
    match call_exists(asked) {
        true => code::SUCCESS,
        false => code::NOT_SUPPORTED,
    }
}

fn call_exists(number: u32) -> bool {
    matches!(
        number,
        function::VERSION
            | function::CPU_SUSPEND
            | function::CPU_OFF
            | function::CPU_ON
            | function::AFFINITY_INFO
            | function::MIGRATE_INFO_TYPE
            | function::SYSTEM_OFF
            | function::SYSTEM_RESET
            | function::FEATURES
            | function::SYSTEM_RESET2
    ) || matches!(
        number ^ function::SMC64,
        function::CPU_SUSPEND | function::CPU_ON | function::AFFINITY_INFO | function::SYSTEM_RESET2
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_32_bit_call_sees_only_the_lower_halves() {
        let request = call(function::CPU_ON, [u64::MAX << 32 | 1, 0xf_4000_0000, 7]);
        assert_eq!(request, Some(Request::CpuOn { target: 1, entry: 0x4000_0000, context: 7 }));
        let wide = call(function::CPU_ON | function::SMC64, [1, 0xf_4000_0000, 7]);
        assert_eq!(wide, Some(Request::CpuOn { target: 1, entry: 0xf_4000_0000, context: 7 }));
    }

    #[test]
    fn features_names_exactly_what_call_understands() {
        for low in 0..0x20 {
            for flag in [0, function::SMC64] {
                let number = 0x8400_0000 | flag | low;
                let listed = features(u64::from(number)) == code::SUCCESS;
                assert_eq!(listed, call(number, [0; 3]).is_some(), "{number:#x}");
            }
        }
    }

    #[test]
    fn an_unknown_function_is_not_ours() {
        assert_eq!(call(0x8400_0050, [0; 3]), None);
        assert_eq!(call(function::VERSION | function::SMC64, [0; 3]), None);
    }

    #[test]
    fn a_reset_type_that_does_not_exist_is_refused() {
        assert_eq!(call(function::SYSTEM_RESET2, [1, 0, 0]), Some(Request::Answer(code::INVALID_PARAMETERS)));
        assert_eq!(call(function::SYSTEM_RESET2, [0, 0, 0]), Some(Request::SystemReset));
    }
}
