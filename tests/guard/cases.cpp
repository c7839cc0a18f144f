// Fixed pieces of the kernel's work, whose instructions `make guard` counts (instructions.py), and whose results `make
// check-platforms` compares between systems and processors (tests/packaging/platforms.py).
//
// Without an argument, lists the names of the cases to count, one per line. With a name, runs that case once, so that
// memory is allocated and symbols are bound, and then once more within `counted`, the function in which callgrind
// counts. With `--results`, runs these and further cases with each instruction set of the machine, and prints a line
// for each: set, case, and the sums of what it computes, exactly. The first two are printed before the case runs, so
// that the last line of a program that crashes says where.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cell.h"
#include "mlstm.h"
#include "nodes.h"

using namespace cellstack;

// callgrind counts only in here. The statement after the call prevents a tail call, which would leave this function.
extern "C" __attribute__((noinline)) void counted(const std::function<void()>& work) {
    static volatile int calls = 0;
    work();
    calls = calls + 1;
}

namespace {

constexpr int kNoAvx2 = 3;  // exit status

uint64_t seed = 1;  // of a case's numbers

// The contents of a case's arrays: the same on every machine, starting at a cache line.
template <class T>
class Numbers {
  public:
    explicit Numbers(int64_t count, double scale = 0) : count_(count), lines_(size_t(count + 15) / 16) {
        for (int64_t k = 0; k < count; ++k) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            at()[k] = T(scale * (double(seed >> 40) / (1 << 23) - 1));  // -scale to scale
        }
    }
    T* at() { return lines_[0].numbers; }
    const T* at() const { return lines_[0].numbers; }
    double sum() const {  // of the magnitudes
        double sum = 0;
        for (int64_t k = 0; k < count_; ++k) sum += std::abs(at()[k]);
        return sum;
    }

  private:
    struct alignas(64) Line {
        T numbers[16];
    };
    int64_t count_;
    std::vector<Line> lines_;
};

// A cell without flags, I = H, and its arrays.
template <class T>
struct Cell {
    Description description{};
    Numbers<T> kernel, recurrent_kernel, bias, cell_vectors;

    Cell(KindIndex kind, int64_t units, bool rows, int64_t heads = 1)
        : kernel(columns(kind, units) * units, 1 / std::sqrt(double(units))),
          recurrent_kernel(columns(kind, units) * units / heads, 1 / std::sqrt(double(units))),
          bias(2 * columns(kind, units), 0.1),
          cell_vectors(kind == kSru ? 2 * units : 0, 0.5) {
        Description& d = description;
        d.kind = &kKinds[kind], d.input = d.units = d.output = units, d.heads = heads;
        for (int k = 0; d.kind->slots[k]; ++k) d.activations[k] = {d.kind->slots[k] == 't' ? kTanh : kSigmoid, 0, 0};
        d.use_bias = d.reset_after = true, d.rows = rows;
        d.clip = d.cell_clip = std::numeric_limits<double>::infinity();
    }
    static int64_t columns(KindIndex kind, int64_t units) { return kKinds[kind].gates * units; }
    std::unique_ptr<Weights<T>> weights(bool copy = true, Element element = element_of<T>()) const {
        Arrays<const T> arrays{};
        arrays.kernel = kernel.at(), arrays.bias = bias.at();
        arrays.recurrent_kernel = description.kind->recurrent ? recurrent_kernel.at() : nullptr;
        arrays.cell_vectors = description.kind == &kKinds[kSru] ? cell_vectors.at() : nullptr;
        return std::make_unique<Weights<T>>(description, arrays, copy, element);
    }
};

struct Work {
    std::function<void()> run;
    std::function<std::vector<double>()> sums;  // of each array of results

    bool sound() const {  // finite, and not all zero
        for (const double sum : sums())
            if (!std::isfinite(sum) || !(sum > 0)) return false;
        return true;
    }
};

// Steps of a stream, one call each.
Work steps(KindIndex kind, int64_t units, Element element) {
    constexpr int count = 10;
    const Cell<float> cell(kind, units, false);
    const std::shared_ptr<Weights<float>> weights = cell.weights(true, element);
    auto stream = std::make_shared<Stream<float>>(std::vector<const Weights<float>*>{weights.get()}, 1);
    auto x = std::make_shared<Numbers<float>>(count * units, 1), y = std::make_shared<Numbers<float>>(count * units);
    return {[=] {
                for (int64_t k = 0; k < count; ++k) stream->run(x->at() + k * units, y->at() + k * units, 1);
            },
            [=] { return std::vector{weights ? y->sum() : 0.0}; }};
}

Work sequence(KindIndex kind, int64_t batch, int64_t length, int64_t units, Element element = Element::kFloat32) {
    const Cell<float> cell(kind, units, false);
    const std::shared_ptr<Weights<float>> weights = cell.weights(true, element);
    auto x = std::make_shared<Numbers<float>>(batch * length * units, 1),
         y = std::make_shared<Numbers<float>>(batch * length * units);
    return {[=] {
                Sequences<float> in{batch, length, x->at(), length * units, units, nullptr, nullptr, false};
                Layer<float> layer{};
                layer.weights = weights.get(), layer.y = y->at();
                forward<float>(in, {layer}, 1);
            },
            [=] { return std::vector{y->sum()}; }};
}

// The forward and backward pass as the torch layers call them: weights in rows, packed for the forward pass, read in
// place by the backward pass. With heads, weights can't be in rows.
template <class T = float>
Work training(KindIndex kind, int64_t batch, int64_t length, int64_t units, Element element = element_of<T>(),
              int64_t heads = 1) {
    struct All {
        Cell<T> cell;
        Numbers<T> x, y, gates, inner, dy, dx, dkernel, drecurrent_kernel, dbias;
    };
    const int64_t numbers = batch * length * units, columns = Cell<T>::columns(kind, units);
    const Cell<T> cell(kind, units, heads == 1, heads);
    const int planes = cell.description.planes(), inner = cell.description.inner_states();
    const bool recurrent = kKinds[kind].recurrent;
    auto all = std::make_shared<All>(All{cell, Numbers<T>(numbers, 1), Numbers<T>(numbers),
                                         Numbers<T>(planes * numbers), Numbers<T>(inner * numbers),
                                         Numbers<T>(numbers, 1), Numbers<T>(numbers), Numbers<T>(columns * units),
                                         Numbers<T>(columns * units / heads), Numbers<T>(2 * columns)});
    return {[=] {
                const Sequences<T> in{batch, length, all->x.at(), length * units, units, nullptr, nullptr, false};
                Layer<T> layer{};
                layer.y = all->y.at(), layer.gates = all->gates.at();
                for (int state = 0; state < inner; ++state) layer.states[state] = all->inner.at() + state * numbers;
                const auto packed = all->cell.weights(true, element), unpacked = all->cell.weights(false, element);
                layer.weights = packed.get();
                forward<T>(in, {layer}, 1);
                layer.weights = unpacked.get();
                Gradients<T> gradients{};
                gradients.dy = all->dy.at(), gradients.dx = all->dx.at();
                gradients.arrays.kernel = all->dkernel.at(), gradients.arrays.bias = all->dbias.at();
                gradients.arrays.recurrent_kernel = recurrent ? all->drecurrent_kernel.at() : nullptr;
                backward<T>(in, {layer}, {gradients}, 1);
            },
            [=] {
                std::vector sums{all->y.sum(), all->dx.sum(), all->dkernel.sum(), all->dbias.sum()};
                if (recurrent) sums.insert(sums.begin() + 3, all->drecurrent_kernel.sum());
                return sums;
            }};
}

// An mLSTM's memory, forward and backward, with more steps than fit into a chunk.
template <class T>
Work memory() {
    constexpr int64_t batch = 2, steps = kChunk + 6;
    constexpr MatrixMemory memory{2, 16, 20, 1e-6};
    struct All {
        Numbers<T> x, y, dy, dx;
    };
    const int64_t in = batch * steps * memory.width(), out = batch * steps * memory.output();
    auto all = std::make_shared<All>(All{Numbers<T>(in, 1), Numbers<T>(out), Numbers<T>(out, 1), Numbers<T>(in)});
    return {[=] {
                MemorySequences<T> sequences{};
                sequences.memory = memory, sequences.batch = batch, sequences.steps = steps;
                sequences.x = all->x.at(), sequences.y = all->y.at();
                sequences.x_row = steps * memory.width(), sequences.x_time = memory.width();
                sequences.form = MemoryForm::kChunks;
                memory_forward<T>(sequences, 1);
                MemoryGradients<T> gradients{};
                gradients.dy = all->dy.at(), gradients.dx = all->dx.at();
                memory_backward<T>(sequences, gradients, 1);
            },
            [=] { return std::vector{all->y.sum(), all->dx.sum()}; }};
}

// Nodes without a state, and every activation.
template <class T>
Work nodes() {
    constexpr int64_t rows = 7, width = 40, taps = 3;
    struct All {
        Numbers<T> x, kernel, normed, convolved, activated;
    };
    auto all =
        std::make_shared<All>(All{Numbers<T>(rows * width, 2), Numbers<T>(taps * width, 1), Numbers<T>(rows * width),
                                  Numbers<T>((rows - taps + 1) * width), Numbers<T>(kActivations * width)});
    return {[=] {
                normalise<T>({rows, 2, width / 2, all->x.at(), nullptr, nullptr, all->normed.at(), 1e-5, true});
                convolve<T>({1,
                             rows - taps + 1,
                             width,
                             taps,
                             1,
                             rows * width,
                             all->x.at(),
                             all->kernel.at(),
                             nullptr,
                             all->convolved.at(),
                             {kSilu, 0, 0}});
                for (int code = 0; code < kActivations; ++code)
                    activate({code, 0.3, 0.2}, all->x.at(), all->activated.at() + code * width, width);
            },
            [=] { return std::vector{all->normed.sum(), all->convolved.sum(), all->activated.sum()}; }};
}

Work packing(KindIndex kind, int64_t units, bool rows, Element element) {
    auto cell = std::make_shared<Cell<float>>(kind, units, rows);
    auto packed = std::make_shared<std::unique_ptr<Weights<float>>>();
    return {[=] { *packed = cell->weights(true, element); }, [=] { return std::vector{double((*packed)->copied())}; }};
}

using Case = std::pair<std::string, std::function<Work()>>;

std::vector<Case> counted_cases() {
    std::vector<Case> cases;
    for (const KindIndex kind : {kLstm, kGru}) {
        const auto add = [&, of = std::string(kKinds[kind].name)](const std::string& what,
                                                                  const std::function<Work()>& make) {
            cases.emplace_back(of + " " + what, make);
        };
        add("step H=32", [k = kind] { return steps(k, 32, Element::kFloat32); });
        add("step H=128", [k = kind] { return steps(k, 128, Element::kFloat32); });
        add("step H=128 bfloat16", [k = kind] { return steps(k, 128, Element::kBfloat16); });
        add("step H=128 int8", [k = kind] { return steps(k, 128, Element::kInt8); });
        add("sequence B=1 T=20 H=64", [k = kind] { return sequence(k, 1, 20, 64); });
        add("batch B=32 T=10 H=64", [k = kind] { return sequence(k, 32, 10, 64); });
        add("training B=8 T=10 H=64", [k = kind] { return training(k, 8, 10, 64); });
        add("packing columns H=128", [k = kind] { return packing(k, 128, false, Element::kFloat32); });
        add("packing rows H=128", [k = kind] { return packing(k, 128, true, Element::kFloat32); });
        add("packing columns H=128 bfloat16", [k = kind] { return packing(k, 128, false, Element::kBfloat16); });
        add("packing columns H=128 int8", [k = kind] { return packing(k, 128, false, Element::kInt8); });
    }
    cases.emplace_back("mingru step H=32", [] { return steps(kMinGru, 32, Element::kFloat32); });
    return cases;
}

// Every kind, for one row and for more than two tiles of rows, in every number format; the last block of units has four
// of them. bfloat16 and int8 are the formats of weights.
std::vector<Case> further_cases() {
    std::vector<Case> cases;
    constexpr int64_t length = 5, units = 20;
    for (int index = 0; index < kDense; ++index)
        for (const int64_t batch : {1, 13}) {
            const auto kind = KindIndex(index);
            const int64_t heads = kind == kSlstm ? 2 : 1;
            const std::string name = kKinds[kind].name, shape = " B=" + std::to_string(batch) + " T=5 H=20";
            cases.emplace_back(name + " training" + shape,
                               [=] { return training(kind, batch, length, units, Element::kFloat32, heads); });
            cases.emplace_back(name + " training" + shape + " float64",
                               [=] { return training<double>(kind, batch, length, units, Element::kFloat64, heads); });
            cases.emplace_back(name + " training" + shape + " bfloat16",
                               [=] { return training(kind, batch, length, units, Element::kBfloat16, heads); });
            cases.emplace_back(name + " batch" + shape + " int8",
                               [=] { return sequence(kind, batch, length, units, Element::kInt8); });
        }
    cases.emplace_back("mlstm training", memory<float>);
    cases.emplace_back("mlstm training float64", memory<double>);
    cases.emplace_back("nodes", nodes<float>);
    cases.emplace_back("nodes float64", nodes<double>);
    return cases;
}

int unsound(const std::string& name) {
    fprintf(stderr, "%s: expected finite numbers that aren't all zero\n", name.c_str());
    return 1;
}

int print_results(const std::vector<Case>& cases) {
    for (const char* set : instruction_sets()) {
        set_instruction_set(set);
        for (const Case& one : cases) {
            printf("%s\t%s\t", set, one.first.c_str());
            fflush(stdout);
            seed = 1;
            const Work work = one.second();
            work.run();
            for (const double sum : work.sums()) printf(" %a", sum);
            puts("");
            if (!work.sound()) return unsound(one.first);
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<Case> cases = counted_cases();
    if (argc == 2 && !strcmp(argv[1], "--results")) {
        for (Case& one : further_cases()) cases.push_back(std::move(one));
        return print_results(cases);
    }
    if (!set_instruction_set("avx2")) return kNoAvx2;
    if (argc < 2) {
        for (const Case& one : cases) puts(one.first.c_str());
        return 0;
    }
    for (const Case& one : cases)
        if (one.first == argv[1]) {
            const Work work = one.second();
            work.run();
            counted(work.run);
            return work.sound() ? 0 : unsound(one.first);
        }
    fprintf(stderr, "%s: expected one of the cases that a call without an argument lists\n", argv[1]);
    return 2;
}
