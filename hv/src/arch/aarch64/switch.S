// Guest entry: a function that returns when the guest traps.
//
// hv_enter pushes EL2's callee-saved registers and the address of the guest's, loads the guest's, and leaves
// by ERET. The trap's vector (vectors.S) is the other half: it finds the address on the stack, stores the
// guest's registers, pops ours and returns to the caller with the kind of trap. Offsets are GuestRegs's.
// Stack while the guest runs:  sp -> [regs, -, x19, x20, ... x28, x29, x30].

    .section .text.hv_enter, "ax"
    .balign 64
    .global hv_enter
hv_enter:
    sub     sp, sp, #112
    str     x0, [sp]
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
    stp     x29, x30, [sp, #96]
    ldp     x30, x1, [x0, #240]
    ldr     x2, [x0, #256]
    msr     elr_el2, x1
    msr     spsr_el2, x2
    ldp     x2, x3, [x0, #16]
    ldp     x4, x5, [x0, #32]
    ldp     x6, x7, [x0, #48]
    ldp     x8, x9, [x0, #64]
    ldp     x10, x11, [x0, #80]
    ldp     x12, x13, [x0, #96]
    ldp     x14, x15, [x0, #112]
    ldp     x16, x17, [x0, #128]
    ldp     x18, x19, [x0, #144]
    ldp     x20, x21, [x0, #160]
    ldp     x22, x23, [x0, #176]
    ldp     x24, x25, [x0, #192]
    ldp     x26, x27, [x0, #208]
    ldp     x28, x29, [x0, #224]
    ldp     x0, x1, [x0]
    eret
    dsb     nsh                         // nothing behind an ERET may be speculated into
    isb
