// Whole pages: zero, copy, clean. The cost of a fault is mostly here, so the loops are unrolled and each ends
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

// x0 = page to fill, x1 = page to copy: copy, then clean the copy.
    .balign 64
    .global hv_page_copy
hv_page_copy:
    add     x9, x0, #4096
0:  ldp     x2, x3, [x1]
    ldp     x4, x5, [x1, #16]
    ldp     x6, x7, [x1, #32]
    ldp     x10, x11, [x1, #48]
    stp     x2, x3, [x0]
    stp     x4, x5, [x0, #16]
    stp     x6, x7, [x0, #32]
    stp     x10, x11, [x0, #48]
    ldp     x2, x3, [x1, #64]
    ldp     x4, x5, [x1, #80]
    ldp     x6, x7, [x1, #96]
    ldp     x10, x11, [x1, #112]
    stp     x2, x3, [x0, #64]
    stp     x4, x5, [x0, #80]
    stp     x6, x7, [x0, #96]
    stp     x10, x11, [x0, #112]
    dc      cvac, x0
    add     x8, x0, #64
    dc      cvac, x8
    add     x1, x1, #128
    add     x0, x0, #128
    cmp     x0, x9
    b.ne    0b
    dsb     ish
    ret

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
