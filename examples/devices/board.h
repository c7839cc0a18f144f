/* What the example needs of a board: files on the host, by semihosting, and a counter. */
#include <stddef.h>
#include <stdint.h>

/* Open a file on the host, for reading or for writing; -1 if that fails. */
int board_open(const char *path, int writes);

/* Read or write exactly this many bytes; 0 if fewer can be. */
int board_read(int file, void *to, size_t bytes);
int board_write(int file, const void *from, size_t bytes);

/* End the program; 0 is success. */
void board_exit(int status);

/* The processor's ticks, modulo 2^24. */
uint32_t board_ticks(void);
