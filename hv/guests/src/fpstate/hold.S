// fpstate_hold(x0: record). Words of the record: x0 to x30, our own stack pointer, the flags; what was found lies from
// word 34 on: x0 to x29, the flags, the stack pointer, DAIF.

    .section .text
    .global fpstate_hold
fpstate_hold:
    stp     x29, x30, [sp, #-96]!
    stp     x27, x28, [sp, #16]
    stp     x25, x26, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x21, x22, [sp, #64]
    stp     x19, x20, [sp, #80]
    mov     x1, sp
    str     x1, [x0, #31 * 8]
    mov     sp, x0
    ldr     x1, [sp, #32 * 8]
    msr     nzcv, x1
    ldp     x0, x1, [sp]
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x19, [sp, #144]
    ldp     x20, x21, [sp, #160]
    ldp     x22, x23, [sp, #176]
    ldp     x24, x25, [sp, #192]
    ldp     x26, x27, [sp, #208]
    ldp     x28, x29, [sp, #224]
    ldr     x30, [sp, #240]
    cbz     x30, 2f
1:  add     x29, x29, #1
    sub     x30, x30, #1
    cbnz    x30, 1b
    b       3f
2:  hvc     #0
3:  stp     x0, x1, [sp, #272]
    stp     x2, x3, [sp, #288]
    stp     x4, x5, [sp, #304]
    stp     x6, x7, [sp, #320]
    stp     x8, x9, [sp, #336]
    stp     x10, x11, [sp, #352]
    stp     x12, x13, [sp, #368]
    stp     x14, x15, [sp, #384]
    stp     x16, x17, [sp, #400]
    stp     x18, x19, [sp, #416]
    stp     x20, x21, [sp, #432]
    stp     x22, x23, [sp, #448]
    stp     x24, x25, [sp, #464]
    stp     x26, x27, [sp, #480]
    stp     x28, x29, [sp, #496]
    mrs     x0, nzcv
    str     x0, [sp, #512]
    mov     x0, sp
    str     x0, [sp, #520]
    mrs     x0, daif
    str     x0, [sp, #528]
    ldr     x0, [sp, #31 * 8]
    mov     sp, x0
    ldp     x19, x20, [sp, #80]
    ldp     x21, x22, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #32]
    ldp     x27, x28, [sp, #16]
    ldp     x29, x30, [sp], #96
    ret
