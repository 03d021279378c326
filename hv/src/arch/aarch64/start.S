// From reset to Rust, on every CPU.
//
// The first CPU arrives from the loader with the MMU off and nothing promised but EL2; x0 may hold the
// device tree (the loader of an ELF leaves it undefined, so Rust looks before it believes). It turns the MMU
// on with a map of one gigabyte around the image, because atomics need normal memory, and calls boot::start.
// Every other CPU arrives from PSCI CPU_ON with its number in x0, turns the MMU on with the final map that
// `hv_mmu` holds, and calls boot::secondary. Values of MAIR, TCR and SCTLR are stage1.rs's and el2.rs's.

    .section .text.boot, "ax"
    .global _start
_start:
    msr     daifset, #0xf
    mrs     x1, CurrentEL
    cmp     x1, #(2 << 2)
    b.ne    9f                          // not EL2: there is nothing we could do here
    mov     x20, x0

    adrp    x0, __bss_start
    add     x0, x0, :lo12:__bss_start
    adrp    x1, __boot_stack_top
    add     x1, x1, :lo12:__boot_stack_top
0:  stp     xzr, xzr, [x0], #16         // .bss and the boot stack, which follows it
    cmp     x0, x1
    b.lo    0b
    mov     sp, x1

    // One L0 entry to one L1 table with one block: the gigabyte that holds the image, writable and executable
    // until boot::start has made the real map.
    adrp    x1, {boot_l0}
    add     x1, x1, :lo12:{boot_l0}
    adrp    x2, {boot_l1}
    add     x2, x2, :lo12:{boot_l1}
    adrp    x3, _start
    and     x4, x3, #~((1 << 30) - 1)   // the gigabyte
    mov     x5, #{block_rwx}
    orr     x5, x5, x4
    ubfx    x6, x3, #30, #9
    str     x5, [x2, x6, lsl #3]
    orr     x5, x2, #3
    ubfx    x6, x3, #39, #9
    str     x5, [x1, x6, lsl #3]
    dsb     sy

    mov     x0, x1
    ldr     x1, ={tcr}
    ldr     x2, ={mair}
    ldr     x3, ={sctlr_early}
    bl      enable_mmu
    msr     tpidr_el2, xzr              // CPU 0
    adrp    x0, hv_vectors
    add     x0, x0, :lo12:hv_vectors
    msr     vbar_el2, x0
    isb
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x20
    bl      {start}
9:  wfi
    b       9b

    .global secondary_start
secondary_start:
    msr     daifset, #0xf
    mov     x20, x0
    adrp    x4, {hv_mmu}
    add     x4, x4, :lo12:{hv_mmu}
    ldp     x0, x1, [x4]                // root, TCR: cleaned to memory before CPU_ON
    ldp     x2, x3, [x4, #16]           // MAIR, SCTLR
    bl      enable_mmu
    msr     tpidr_el2, x20
    adrp    x0, hv_vectors
    add     x0, x0, :lo12:hv_vectors
    msr     vbar_el2, x0
    isb
    adrp    x1, {stack_tops}
    add     x1, x1, :lo12:{stack_tops}
    ldr     x1, [x1, x20, lsl #3]
    mov     sp, x1
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x20
    bl      {secondary}
8:  wfi
    b       8b

// x0 = root, x1 = TCR_EL2, x2 = MAIR_EL2, x3 = SCTLR_EL2
enable_mmu:
    msr     mair_el2, x2
    msr     tcr_el2, x1
    msr     ttbr0_el2, x0
    tlbi    alle2
    dsb     nsh
    ic      iallu
    dsb     nsh
    isb
    msr     sctlr_el2, x3
    isb
    ret
    .ltorg
