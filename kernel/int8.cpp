// Products with int8 weights for processors with an instruction for them.
#include "tiles.h"

namespace cellstack {
namespace CELLSTACK_ISA {
extern const Replacement int8;
const Replacement int8 = {"avx512vnni", CELLSTACK_NEEDS, tiles_of<Int8>()};
}  // namespace CELLSTACK_ISA
}  // namespace cellstack
