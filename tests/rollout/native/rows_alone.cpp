// Checks the products for one kind of processor, as a program: it can be run by an emulator, where torch cannot.
//
// Every row of a product must have the bits that it has alone, and be right by sums in double. Prints what is wrong.
#include <cstdio>
#include <random>

#include "gradients.cpp"
#include "kernels.cpp"

namespace {

std::mt19937 generator(0);

std::vector<bfloat16> numbers(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<bfloat16> x(count);
  for (auto& value : x) value = from_float<bfloat16>(normal(generator));
  return x;
}

int wrong = 0;

void expect(bool right, const char* what, int64_t rows) {
  if (!right) ++wrong, std::printf("%s, %d rows\n", what, static_cast<int>(rows));
}

template <typename T>
bool near(T found, double exact) {
  return std::abs(to_float(found) - exact) <= 1e-3 + std::abs(exact) / (sizeof(T) == 2 ? 128 : 1e5);
}

// Returns the sum over k of a[k a_stride] b[k b_stride], exactly enough to judge float32 sums by.
template <typename T>
double dot(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += static_cast<double>(to_float(a[k * a_stride])) * to_float(b[k * b_stride]);
  return sum;
}

// Checks out = x weight^T for 1 to `most` rows; `multiply` computes it for the first rows of x.
template <typename T, typename Multiply>
void check_product(const char* what, const std::vector<T>& x, const std::vector<T>& weight, int64_t most, Multiply multiply) {
  const int64_t inputs = x.size() / most, outputs = weight.size() / inputs;
  std::vector<T> alone(most * outputs), together(most * outputs);
  for (int64_t row = 0; row < most; ++row) multiply(x.data() + row * inputs, 1, alone.data() + row * outputs);
  for (int64_t rows : {2, 3, 4, 5, 7, 12, 13, 31, 33, 97}) {
    multiply(x.data(), rows, together.data());
    expect(std::memcmp(alone.data(), together.data(), rows * outputs * sizeof(T)) == 0, what, rows);
  }
  bool right = true;
  for (int64_t row = 0; row < most; ++row)
    for (int64_t n = 0; n < outputs; ++n)
      right &= near(alone[row * outputs + n], dot(&x[row * inputs], 1, &weight[n * inputs], 1, inputs));
  expect(right, what, 1);
}

void check_products() {
  const int64_t most = 97, inputs = 288, outputs = 96;
  const std::vector<bfloat16> x = numbers(most * inputs), weight = numbers(outputs * inputs);
  std::vector<bfloat16> packed(weight.size());
  paceline_pack_weight(weight.data(), outputs, inputs, packed.data());
  check_product("packed", x, weight, most, [&](const bfloat16* rows, int64_t count, bfloat16* out) {
    paceline_multiply_packed(rows, count, packed.data(), outputs, inputs, nullptr, nullptr, out);
  });
  check_product("bfloat16", x, weight, most, [&](const bfloat16* rows, int64_t count, bfloat16* out) {
    paceline_multiply_dots_bfloat16(rows, count, weight.data(), outputs, inputs, nullptr, nullptr, out, outputs);
  });
  std::vector<float> wide_x, wide_weight;
  for (bfloat16 value : x) wide_x.push_back(to_float(value));
  for (bfloat16 value : weight) wide_weight.push_back(to_float(value));
  check_product("float32", wide_x, wide_weight, most, [&](const float* rows, int64_t count, float* out) {
    paceline_multiply_dots_float32(rows, count, wide_weight.data(), outputs, inputs, nullptr, nullptr, out, outputs);
  });
}

void check_gradient() {
  const int64_t tokens = 300, rows = 160, columns = 96, steps = (tokens + kStep - 1) / kStep;
  const std::vector<bfloat16> of_output = numbers(tokens * rows), x = numbers(tokens * columns);
  std::vector<bfloat16> left(steps * kStep * rows), right(steps * kStep * columns);
  paceline_pack_transposed(of_output.data(), tokens, rows, left.data());
  paceline_pack_transposed(x.data(), tokens, columns, right.data());
  std::vector<float> sums(rows * columns, 1.0f);
  paceline_weight_gradient(left.data(), rows, right.data(), columns, steps, sums.data());
  bool all = true;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) all &= near(sums[i * columns + j], 1 + dot(&of_output[i], rows, &x[j], columns, tokens));
  expect(all, "gradient", tokens);
}

}  // namespace

int main() {
  check_products();
  check_gradient();
  std::printf("%d wrong, parts of %d bytes\n", wrong, kRegister);
  return wrong != 0;
}
