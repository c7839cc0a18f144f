/* Start-up code for Cortex-M, and semihosting: the debugger, or QEMU, serves requests at the instruction BKPT 0xAB. */
#include "board.h"

#include <string.h>

extern uint32_t stack_top, data_start, data_end, data_load, bss_start, bss_end;
int main(void);
void reset(void);

static void stop(void)
{
    board_exit(2); /* a fault */
}

typedef union {
    void *stack;
    void (*handler)(void);
} vector;

__attribute__((section(".vectors"), used)) static const vector vectors[16] = {
    {&stack_top}, {.handler = reset}, {.handler = stop}, {.handler = stop},
    {.handler = stop}, {.handler = stop}, {.handler = stop},
};

void reset(void)
{
#ifdef __ARM_FP
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* CPACR: enable the floating-point unit */
    __asm volatile("dsb\n isb");
#endif
    memcpy(&data_start, &data_load, (size_t)((char *)&data_end - (char *)&data_start));
    memset(&bss_start, 0, (size_t)((char *)&bss_end - (char *)&bss_start));
    ((volatile uint32_t *)0xE000E010)[1] = 0xFFFFFF; /* SysTick counts down from here */
    ((volatile uint32_t *)0xE000E010)[2] = 0;
    ((volatile uint32_t *)0xE000E010)[0] = 5; /* at the processor's clock, without interrupts */
    board_exit(main());
}

static int semihosting(int operation, const void *arguments)
{
    register int r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = arguments;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

int board_open(const char *path, int writes)
{
    const uintptr_t arguments[] = {(uintptr_t)path, writes ? 5 : 1, strlen(path)}; /* modes wb and rb */
    return semihosting(0x01, arguments);
}

int board_read(int file, void *to, size_t bytes)
{
    const uintptr_t arguments[] = {(uintptr_t)file, (uintptr_t)to, bytes};
    return semihosting(0x06, arguments) == 0; /* what is missing */
}

int board_write(int file, const void *from, size_t bytes)
{
    const uintptr_t arguments[] = {(uintptr_t)file, (uintptr_t)from, bytes};
    return semihosting(0x05, arguments) == 0;
}

void board_exit(int status)
{
    const uintptr_t arguments[] = {0x20026, (uintptr_t)status}; /* the application ended */
    semihosting(0x20, arguments);
    for (;;) {
    }
}

uint32_t board_ticks(void)
{
    return 0xFFFFFF - ((volatile uint32_t *)0xE000E010)[2];
}
