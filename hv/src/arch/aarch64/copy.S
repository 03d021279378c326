// memcpy, memmove, memset: what the compiler calls to move and fill values.
//
// EL2 has no FP registers to move with, and the compiler's own versions go byte by byte, because its target may not
// touch unaligned words. Here it may: SCTLR_EL2.A is 0, and nothing calls these on device memory. Every step loads
// all that it stores, so going up is right wherever the destination does not begin inside the source.
// x0 = destination, which is also the answer; x1 = source or byte; x2 = count.

    .section .text.copy, "ax"
    .balign 64
    .global memmove
    .type memmove, @function
memmove:
    sub     x4, x0, x1
    cmp     x4, x2
    b.lo    .Ldown                      // the destination begins inside the source
    .global memcpy
    .type memcpy, @function
memcpy:
    mov     x3, x0
    cmp     x2, #64
    b.lo    2f
1:  ldp     x4, x5, [x1]
    ldp     x6, x7, [x1, #16]
    ldp     x8, x9, [x1, #32]
    ldp     x10, x11, [x1, #48]
    stp     x4, x5, [x3]
    stp     x6, x7, [x3, #16]
    stp     x8, x9, [x3, #32]
    stp     x10, x11, [x3, #48]
    add     x1, x1, #64
    add     x3, x3, #64
    sub     x2, x2, #64
    cmp     x2, #64
    b.hs    1b
2:  tbz     x2, #5, 3f                  // less than 64: each bit of the count is a piece
    ldp     x4, x5, [x1]
    ldp     x6, x7, [x1, #16]
    stp     x4, x5, [x3]
    stp     x6, x7, [x3, #16]
    add     x1, x1, #32
    add     x3, x3, #32
3:  tbz     x2, #4, 4f
    ldp     x4, x5, [x1], #16
    stp     x4, x5, [x3], #16
4:  tbz     x2, #3, 5f
    ldr     x4, [x1], #8
    str     x4, [x3], #8
5:  tbz     x2, #2, 6f
    ldr     w4, [x1], #4
    str     w4, [x3], #4
6:  tbz     x2, #1, 7f
    ldrh    w4, [x1], #2
    strh    w4, [x3], #2
7:  tbz     x2, #0, 8f
    ldrb    w4, [x1]
    strb    w4, [x3]
8:  ret

.Ldown:                                 // from the end to the beginning
    add     x1, x1, x2
    add     x3, x0, x2
    cmp     x2, #16
    b.lo    2f
1:  ldp     x4, x5, [x1, #-16]!
    stp     x4, x5, [x3, #-16]!
    sub     x2, x2, #16
    cmp     x2, #16
    b.hs    1b
2:  tbz     x2, #3, 3f
    ldr     x4, [x1, #-8]!
    str     x4, [x3, #-8]!
3:  tbz     x2, #2, 4f
    ldr     w4, [x1, #-4]!
    str     w4, [x3, #-4]!
4:  tbz     x2, #1, 5f
    ldrh    w4, [x1, #-2]!
    strh    w4, [x3, #-2]!
5:  tbz     x2, #0, 6f
    ldrb    w4, [x1, #-1]
    strb    w4, [x3, #-1]
6:  ret

    .global memset
    .type memset, @function
memset:
    mov     x3, x0
    and     x1, x1, #0xff
    orr     x1, x1, x1, lsl #8
    orr     x1, x1, x1, lsl #16
    orr     x1, x1, x1, lsl #32
    cmp     x2, #64
    b.lo    2f
1:  stp     x1, x1, [x3]
    stp     x1, x1, [x3, #16]
    stp     x1, x1, [x3, #32]
    stp     x1, x1, [x3, #48]
    add     x3, x3, #64
    sub     x2, x2, #64
    cmp     x2, #64
    b.hs    1b
2:  tbz     x2, #5, 3f
    stp     x1, x1, [x3], #16
    stp     x1, x1, [x3], #16
3:  tbz     x2, #4, 4f
    stp     x1, x1, [x3], #16
4:  tbz     x2, #3, 5f
    str     x1, [x3], #8
5:  tbz     x2, #2, 6f
    str     w1, [x3], #4
6:  tbz     x2, #1, 7f
    strh    w1, [x3], #2
7:  tbz     x2, #0, 8f
    strb    w1, [x3]
8:  ret
