// Whole pages: zero, copy, clean, sum. The cost of a fault is mostly here, so the loops are unrolled and each ends
// in one barrier. Cleaning goes to the point of coherency, because a guest may look with its caches off.
// Lines are taken as 64 bytes; cache.rs does not call these where CTR_EL0 or DCZID_EL0 says otherwise.

    // Eight lines from x0 on, 512 bytes.
    .macro lines op
    dc      \op, x0
    add     x2, x0, #64
    dc      \op, x2
    add     x3, x0, #128
    dc      \op, x3
    add     x4, x0, #192
    dc      \op, x4
    add     x5, x0, #256
    dc      \op, x5
    add     x6, x0, #320
    dc      \op, x6
    add     x7, x0, #384
    dc      \op, x7
    add     x8, x0, #448
    dc      \op, x8
    .endm

    .section .text.hv_page, "ax"
// x0 = page: zero it and clean it.
    .balign 64
    .global hv_page_zero
hv_page_zero:
    add     x9, x0, #4096
0:  lines   zva
    dc      cvac, x0
    dc      cvac, x2
    dc      cvac, x3
    dc      cvac, x4
    dc      cvac, x5
    dc      cvac, x6
    dc      cvac, x7
    dc      cvac, x8
    add     x0, x0, #512
    cmp     x0, x9
    b.ne    0b
    dsb     ish
    ret

// x0 = page to fill, x1 = page to copy: clean and invalidate each line of the one, copy it, clean the copy. No barrier
// in between: maintenance by address and accesses to the same line are in program order (DDI 0487, "Ordering and
// completion of data and instruction cache instructions"). The vector registers are some vCPU's, and perhaps
// trapped: they are borrowed, and are afterwards what they were. No guest has SVE, so nothing lies above them.
    .arch_extension fp
    .arch_extension simd
    .macro line
    dc      civac, x1
    ldp     q0, q1, [x1], #64
    ldp     q2, q3, [x1, #-32]
    stp     q0, q1, [x0]
    stp     q2, q3, [x0, #32]
    dc      cvac, x0
    add     x0, x0, #64
    .endm
    .balign 64
    .global hv_page_copy
hv_page_copy:
    mrs     x10, cptr_el2
    and     x11, x10, #~(1 << 10)       // TFP
    msr     cptr_el2, x11
    isb
    stp     q0, q1, [sp, #-64]!
    stp     q2, q3, [sp, #32]
    add     x9, x0, #4096
0:  .rept   8
    line
    .endr
    cmp     x0, x9
    b.ne    0b
    dsb     ish
    ldp     q2, q3, [sp, #32]
    ldp     q0, q1, [sp], #64
    msr     cptr_el2, x10
    isb
    ret
    .arch_extension nosimd
    .arch_extension nofp

// x0 = page: clean it.
    .balign 64
    .global hv_page_clean
hv_page_clean:
    add     x9, x0, #4096
0:  lines   cvac
    add     x0, x0, #512
    cmp     x0, x9
    b.ne    0b
    dsb     ish
    ret

// x0 = page: clean and invalidate it.
    .balign 64
    .global hv_page_clean_invalidate
hv_page_clean_invalidate:
    add     x9, x0, #4096
0:  lines   civac
    add     x0, x0, #512
    cmp     x0, x9
    b.ne    0b
    dsb     ish
    ret

// x0 = page, x1 = key: clean and invalidate the page; w0 = CRC-32C of the key and it. Only where ID_AA64ISAR0_EL1 has
// CRC32. As in hv_page_copy, no barrier between a line's maintenance and the look at it.
    .arch_extension crc
    .macro sum_line
    dc      civac, x0
    ldp     x2, x3, [x0], #64
    ldp     x4, x5, [x0, #-48]
    ldp     x6, x7, [x0, #-32]
    ldp     x10, x11, [x0, #-16]
    crc32cx w8, w8, x2
    crc32cx w8, w8, x3
    crc32cx w8, w8, x4
    crc32cx w8, w8, x5
    crc32cx w8, w8, x6
    crc32cx w8, w8, x7
    crc32cx w8, w8, x10
    crc32cx w8, w8, x11
    .endm
    .balign 64
    .global hv_page_crc
hv_page_crc:
    add     x9, x0, #4096
    mov     w8, #-1
    crc32cx w8, w8, x1
0:  .rept   16
    sum_line
    .endr
    cmp     x0, x9
    b.ne    0b
    dsb     ish
    mov     w0, w8
    ret
    .arch_extension nocrc
