// The way in, and the vectors.
//
// _start is entered on the first vCPU with the tree in x0; secondary_start on another, by PSCI CPU_ON,
// with its index in x0. Both find the MMU off. Stacks grow down from their ends, 8 KiB each.

    .set STACK, 8192

    .section .text.boot, "ax"
    .global _start
_start:
    ldr     x1, =__stacks + STACK
    mov     sp, x1
    ldr     x1, =vectors
    msr     vbar_el1, x1
    ldr     x1, =__bss_start
    ldr     x2, =__bss_end
1:  cmp     x1, x2
    b.hs    2f
    stp     xzr, xzr, [x1], #16
    b       1b
2:  isb
    bl      guest_main
    b       .

    .global secondary_start
secondary_start:
    ldr     x1, =__stacks + STACK
    add     x1, x1, x0, lsl #13
    mov     sp, x1
    ldr     x1, =vectors
    msr     vbar_el1, x1
    isb
    bl      guest_secondary
    b       .

    .ltorg

// A frame: x0 to x30, ELR, SPSR, ESR, FAR, and the virtual counter as the exception found it.
    .set FRAME, 288

    .macro vector kind
    .balign 128
    sub     sp, sp, #FRAME
    stp     x0, x1, [sp]
    mrs     x1, cntvct_el0
    mov     x0, #\kind
    b       trap_common
    .endm

    .section .text.vectors, "ax"
    .balign 2048
vectors:
    .rept   2       // the second for whoever wants VBAR_EL1 to differ from another guest's
    .balign 2048
    vector  0       // from EL1 with SP_EL0, which nobody uses: sync, IRQ, FIQ, SError
    vector  1
    vector  2
    vector  3
    vector  4       // from EL1
    vector  5
    vector  6
    vector  7
    vector  8       // from EL0, AArch64
    vector  9
    vector  10
    vector  11
    vector  12      // from EL0, AArch32
    vector  13
    vector  14
    vector  15
    .endr

trap_common:
    str     x1, [sp, #280]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    mrs     x2, elr_el1
    stp     x30, x2, [sp, #240]
    mrs     x2, spsr_el1
    mrs     x3, esr_el1
    stp     x2, x3, [sp, #256]
    mrs     x2, far_el1
    str     x2, [sp, #272]
    mov     x1, sp
    bl      guest_trap
    ldp     x30, x2, [sp, #240]
    ldr     x3, [sp, #256]
    msr     elr_el1, x2
    msr     spsr_el1, x3
    ldp     x28, x29, [sp, #224]
    ldp     x26, x27, [sp, #208]
    ldp     x24, x25, [sp, #192]
    ldp     x22, x23, [sp, #176]
    ldp     x20, x21, [sp, #160]
    ldp     x18, x19, [sp, #144]
    ldp     x16, x17, [sp, #128]
    ldp     x14, x15, [sp, #112]
    ldp     x12, x13, [sp, #96]
    ldp     x10, x11, [sp, #80]
    ldp     x8, x9, [sp, #64]
    ldp     x6, x7, [sp, #48]
    ldp     x4, x5, [sp, #32]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #FRAME
    eret
