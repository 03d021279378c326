// The exception vectors of EL2.
//
// Two kinds of exception arrive. From a guest (lower EL): the code in the slot saves the guest's general
// registers in the context that `hv_enter` left on the stack, takes EL2's own callee-saved registers back and
// returns into Rust, as if `hv_enter` had been a call that took long. From EL2 itself: a bug, always, because
// EL2 runs with every exception masked; the CPU moves to its emergency stack, so that a stack overflow can be
// told too, and Rust prints everything and ends the machine.

    // x1 = which kind of trap; the stack pointer is where hv_enter left it.
    .macro from_guest kind
    .balign 128
    stp     x0, x1, [sp, #-16]!
    ldr     x0, [sp, #16]               // the GuestRegs that hv_enter pushed
    stp     x2, x3, [x0, #16]
    mov     x1, #\kind
    b       guest_exit
    .endm

    .macro from_el2 kind
    .balign 128
    msr     vpidr_el2, x0               // scratch: no guest will run again
    msr     vmpidr_el2, x1
    mov     x0, #\kind
    b       el2_exception
    .endm

    .section .text.vectors, "ax"
    .balign 2048
    .global hv_vectors
hv_vectors:
    from_el2 0                          // current EL, SP_EL0: never used
    from_el2 1
    from_el2 2
    from_el2 3
    from_el2 4                          // current EL, SP_EL2: synchronous, IRQ, FIQ, SError
    from_el2 5
    from_el2 6
    from_el2 7
    // Lower EL, AArch64. The synchronous slot is the hot one and holds the whole exit.
    .balign 128
    stp     x0, x1, [sp, #-16]!
    ldr     x0, [sp, #16]
    stp     x2, x3, [x0, #16]
    mov     x1, #0
guest_exit:
    stp     x4, x5, [x0, #32]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    mrs     x4, elr_el2
    mrs     x5, spsr_el2
    ldp     x2, x3, [sp], #16
    stp     x30, x4, [x0, #240]
    stp     x2, x3, [x0]
    str     x5, [x0, #256]
    mov     x0, x1                      // from here on this is hv_enter's end
    ldp     x19, x20, [sp, #16]
    ldp     x21, x22, [sp, #32]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #64]
    ldp     x27, x28, [sp, #80]
    ldp     x29, x30, [sp, #96]
    add     sp, sp, #112
    ret
    from_guest 1                        // IRQ
    from_guest 2                        // FIQ
    from_guest 3                        // SError
    from_guest 0                        // Lower EL, AArch32: EL0 only
    from_guest 1
    from_guest 2
    from_guest 3

el2_exception:
    adrp    x1, {emergency}
    add     x1, x1, :lo12:{emergency}
    msr     cntvoff_el2, x2
    mrs     x2, tpidr_el2
    ldr     x2, [x1, x2, lsl #3]
    sub     x2, x2, #288                // a Frame
    str     x0, [x2, #272]
    mrs     x0, vpidr_el2
    mrs     x1, vmpidr_el2
    stp     x0, x1, [x2]
    mrs     x0, cntvoff_el2
    str     x0, [x2, #16]
    stp     x3, x4, [x2, #24]
    stp     x5, x6, [x2, #40]
    stp     x7, x8, [x2, #56]
    stp     x9, x10, [x2, #72]
    stp     x11, x12, [x2, #88]
    stp     x13, x14, [x2, #104]
    stp     x15, x16, [x2, #120]
    stp     x17, x18, [x2, #136]
    stp     x19, x20, [x2, #152]
    stp     x21, x22, [x2, #168]
    stp     x23, x24, [x2, #184]
    stp     x25, x26, [x2, #200]
    stp     x27, x28, [x2, #216]
    stp     x29, x30, [x2, #232]
    mov     x0, sp
    mrs     x1, elr_el2
    stp     x0, x1, [x2, #248]
    mrs     x0, spsr_el2
    str     x0, [x2, #264]
    mov     sp, x2
    mov     x0, x2
    mov     x29, xzr
    mov     x30, xzr
    bl      {el2_died}
7:  wfi
    b       7b
