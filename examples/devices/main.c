/* Runs a network step by step on a Cortex-M board: x.bin -> y.bin on the host, both float32, and to ticks.bin the ticks
 * of all steps together, an uint64. All memory is static. */
#include "board.h"
#include "tagger.h"

static tagger_state state;
static float x[tagger_IN], y[tagger_OUT];

int main(void)
{
    const int from = board_open("x.bin", 0), to = board_open("y.bin", 1), counts = board_open("ticks.bin", 1);
    uint64_t ticks = 0;

    if (from < 0 || to < 0 || counts < 0) {
        return 1;
    }
    tagger_init(&state);
    while (board_read(from, x, sizeof x)) {
        const uint32_t start = board_ticks();
        tagger_step(&state, x, y);
        ticks += (board_ticks() - start) & 0xFFFFFF;
        if (!board_write(to, y, sizeof y)) {
            return 1;
        }
    }
    return !board_write(counts, &ticks, sizeof ticks);
}
