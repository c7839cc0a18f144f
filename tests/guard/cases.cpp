// Fixed pieces of the kernel's work, whose instructions `make guard` counts (instructions.py), and whose results `make
// check-platforms` compares between systems (tests/packaging/platforms.py).
//
// Without an argument, lists the names of all cases, one per line. With a name, runs that case once, so that memory is
// allocated and symbols are bound, and then once more within `counted`, the function in which callgrind counts. With
// `--results`, runs all cases with each instruction set of the machine, and prints a line for each: set, case, and the
// sums of what it computes, exactly.
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
class Numbers {
  public:
    explicit Numbers(int64_t count, double scale = 0) : count_(count), lines_(size_t(count + 15) / 16) {
        for (int64_t k = 0; k < count; ++k) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            at()[k] = float(scale * (double(seed >> 40) / (1 << 23) - 1));  // -scale to scale
        }
    }
    float* at() { return lines_[0].numbers; }
    const float* at() const { return lines_[0].numbers; }
    double sum() const {  // of the magnitudes
        double sum = 0;
        for (int64_t k = 0; k < count_; ++k) sum += std::abs(at()[k]);
        return sum;
    }

  private:
    struct alignas(64) Line {
        float numbers[16];
    };
    int64_t count_;
    std::vector<Line> lines_;
};

// A cell without flags, I = H, and its arrays.
struct Cell {
    Description description{};
    Numbers kernel, recurrent_kernel, bias;

    Cell(KindIndex kind, int64_t units, bool rows)
        : kernel(columns(kind, units) * units, 1 / std::sqrt(double(units))),
          recurrent_kernel(columns(kind, units) * units, 1 / std::sqrt(double(units))),
          bias(2 * columns(kind, units), 0.1) {
        Description& d = description;
        d.kind = &kKinds[kind], d.input = d.units = d.output = units;
        for (int k = 0; d.kind->slots[k]; ++k) d.activations[k] = {d.kind->slots[k] == 't' ? kTanh : kSigmoid, 0, 0};
        d.use_bias = d.reset_after = true, d.rows = rows;
        d.clip = d.cell_clip = std::numeric_limits<double>::infinity();
    }
    static int64_t columns(KindIndex kind, int64_t units) { return kKinds[kind].gates * units; }
    std::unique_ptr<Weights<float>> weights(bool copy = true, Element element = Element::kFloat32) const {
        Arrays<const float> arrays{};
        arrays.kernel = kernel.at(), arrays.recurrent_kernel = recurrent_kernel.at(), arrays.bias = bias.at();
        return std::make_unique<Weights<float>>(description, arrays, copy, element);
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
    const Cell cell(kind, units, false);
    const std::shared_ptr<Weights<float>> weights = cell.weights(true, element);
    auto stream = std::make_shared<Stream<float>>(std::vector<const Weights<float>*>{weights.get()}, 1);
    auto x = std::make_shared<Numbers>(count * units, 1), y = std::make_shared<Numbers>(count * units);
    return {[=] {
                for (int64_t k = 0; k < count; ++k) stream->run(x->at() + k * units, y->at() + k * units, 1);
            },
            [=] { return std::vector{weights ? y->sum() : 0.0}; }};
}

Work sequence(KindIndex kind, int64_t batch, int64_t length, int64_t units) {
    const Cell cell(kind, units, false);
    const std::shared_ptr<Weights<float>> weights = cell.weights();
    auto x = std::make_shared<Numbers>(batch * length * units, 1),
         y = std::make_shared<Numbers>(batch * length * units);
    return {[=] {
                Sequences<float> in{batch, length, x->at(), length * units, units, nullptr, nullptr, false};
                Layer<float> layer{};
                layer.weights = weights.get(), layer.y = y->at();
                forward<float>(in, {layer}, 1);
            },
            [=] { return std::vector{y->sum()}; }};
}

// The forward and backward pass as the torch layers call them: weights in rows, packed for the forward pass, read in
// place by the backward pass.
Work training(KindIndex kind, int64_t batch, int64_t length, int64_t units) {
    struct All {
        Cell cell;
        Numbers x, y, gates, inner, dy, dx, dkernel, drecurrent_kernel, dbias;
    };
    const int64_t numbers = batch * length * units, columns = Cell::columns(kind, units);
    auto all = std::make_shared<All>(All{Cell(kind, units, true), Numbers(numbers, 1), Numbers(numbers),
                                         Numbers(4 * numbers), Numbers(numbers), Numbers(numbers, 1), Numbers(numbers),
                                         Numbers(columns * units), Numbers(columns * units), Numbers(2 * columns)});
    return {[=] {
                const Sequences<float> in{batch, length, all->x.at(), length * units, units, nullptr, nullptr, false};
                Layer<float> layer{};
                layer.y = all->y.at(), layer.gates = all->gates.at();
                layer.states[0] = kKinds[kind].states > 1 ? all->inner.at() : nullptr;
                const auto packed = all->cell.weights(), unpacked = all->cell.weights(false);
                layer.weights = packed.get();
                forward<float>(in, {layer}, 1);
                layer.weights = unpacked.get();
                Gradients<float> gradients{};
                gradients.dy = all->dy.at(), gradients.dx = all->dx.at();
                gradients.arrays.kernel = all->dkernel.at(), gradients.arrays.bias = all->dbias.at();
                gradients.arrays.recurrent_kernel = all->drecurrent_kernel.at();
                backward<float>(in, {layer}, {gradients}, 1);
            },
            [=] {
                return std::vector{all->y.sum(), all->dx.sum(), all->dkernel.sum(), all->drecurrent_kernel.sum(),
                                   all->dbias.sum()};
            }};
}

Work packing(KindIndex kind, int64_t units, bool rows, Element element) {
    auto cell = std::make_shared<Cell>(kind, units, rows);
    auto packed = std::make_shared<std::unique_ptr<Weights<float>>>();
    return {[=] { *packed = cell->weights(true, element); }, [=] { return std::vector{double((*packed)->copied())}; }};
}

using Case = std::pair<std::string, std::function<Work()>>;

std::vector<Case> all_cases() {
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

int unsound(const std::string& name) {
    fprintf(stderr, "%s: expected finite numbers that aren't all zero\n", name.c_str());
    return 1;
}

int print_results(const std::vector<Case>& cases) {
    for (const char* set : instruction_sets()) {
        set_instruction_set(set);
        for (const Case& one : cases) {
            seed = 1;
            const Work work = one.second();
            work.run();
            printf("%s\t%s\t", set, one.first.c_str());
            for (const double sum : work.sums()) printf(" %a", sum);
            puts("");
            if (!work.sound()) return unsound(one.first);
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = all_cases();
    if (argc == 2 && !strcmp(argv[1], "--results")) return print_results(cases);
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
