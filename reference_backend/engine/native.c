// A layer on a CPU, in float32. native.py builds and calls this, and says what each function gives.
// NaN passes through: what a request has spoilt must be seen in its scores.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Int;
enum { LANES = 8, PANEL = 32, PARTS = PANEL / LANES, FEW = 3 };  // 3 * 4 sums, 3 of x, 1 of weights: 16 registers
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
enum { WORTH_SHARING = 200000 };  // multiplications, for a second thread to be woken

// e to the x, for x <= 88, to about two units in the last place: 2^n is put into the exponent, the rest is a polynomial (Cephes' expf).
static inline float power(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = floorf((x > -87.0f ? x : -87.0f) * 1.44269504f + 0.5f);  // a number, even if x is none: it becomes an integer
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { uint32_t bits; float value; } scale = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    return p * scale.value;
}

static inline float dot(const float *restrict a, const float *restrict b, Int width)
{
    float sum = 0.0f;
    for (Int i = 0; i < width; i++) sum += a[i] * b[i];
    return sum;
}

// `rows` rows of x times a panel of 32 columns [in, 32]; sums begin with `start`, of which rows are `step` apart, if there is one.
static inline __attribute__((always_inline)) void panel_product(const Int rows, const float *restrict x, const float *restrict w,
                                                                const float *restrict start, Int step, float *restrict y, Int in, Int out)
{
    Vector sums[FEW][PARTS];
    for (Int r = 0; r < rows; r++)
        for (Int p = 0; p < PARTS; p++)
            sums[r][p] = start ? *(const Vector *)(start + r * step + p * LANES) : (Vector){0};
    for (Int k = 0; k < in; k++, w += PANEL)
        for (Int p = 0; p < PARTS; p++) {
            const Vector weights = *(const volatile Vector *)(w + p * LANES);  // else it is read again for each row: a fifth more time
            for (Int r = 0; r < rows; r++) sums[r][p] += x[r * in + k] * weights;
        }
    for (Int r = 0; r < rows; r++)
        for (Int p = 0; p < PARTS; p++) *(Vector *)(y + r * out + p * LANES) = sums[r][p];
}

// Each panel is read from memory once: that is what a product of few rows takes its time for.
void product(const float *x, const float *panels, const float *start, Int step, float *y, Int rows, Int in, Int out)
{
    #pragma omp parallel for if (rows * in * out > WORTH_SHARING)
    for (Int column = 0; column < out; column += PANEL) {
        const float *w = panels + column * in, *from = start ? start + column : NULL;
        for (Int r = 0; r < rows; r += FEW) {
            const float *of_x = x + r * in, *of_start = from ? from + r * step : NULL;
            float *of_y = y + r * out + column;
            switch (rows - r) {
            case 1: panel_product(1, of_x, w, of_start, step, of_y, in, out); break;
            case 2: panel_product(2, of_x, w, of_start, step, of_y, in, out); break;
            default: panel_product(FEW, of_x, w, of_start, step, of_y, in, out);
            }
        }
    }
}

// Rows of a matrix that is kept in panels.
void rows(const float *restrict panels, const Int *restrict ids, float *restrict y, Int count, Int in)
{
    for (; count--; ids++)
        for (Int i = 0; i < in; i++) *y++ = panels[(*ids / PANEL * in + i) * PANEL + *ids % PANEL];
}

// y = x over the root of its sum of squares plus epsilon; rows of x [rows, width].
void norm(const float *restrict x, float *restrict y, Int rows, Int width, float epsilon)
{
    for (; rows--; x += width, y += width) {
        float factor = 1.0f / sqrtf(dot(x, x, width) + epsilon);
        for (Int i = 0; i < width; i++) y[i] = x[i] * factor;
    }
}

// silu(gate) * up, of rows [gate | up].
void silu_times(const float *restrict gate_up, float *restrict y, Int rows, Int width)
{
    for (; rows--; gate_up += 2 * width, y += width)
        for (Int i = 0; i < width; i++) {
            float gate = gate_up[i];
            y[i] = gate / (1.0f + power(-gate > 87.0f ? 87.0f : -gate)) * gate_up[width + i];
        }
}

// The query or key of a head, normalised where it has gains, and turned.
static void rotate(float *restrict head, const float *restrict gain, const float *restrict turn, Int width, float epsilon)
{
    if (gain) {
        float factor = 1.0f / sqrtf(dot(head, head, width) + epsilon);
        for (Int i = 0; i < width; i++) head[i] *= factor * gain[i];
    }
    for (Int i = 0; i < width; i += 2) {
        float even = head[i], odd = head[i + 1];
        head[i] = even * turn[i] - odd * turn[i + 1];
        head[i + 1] = even * turn[i + 1] + odd * turn[i];
    }
}

// One query over `keys` keys and values, in blocks: the sums of earlier blocks shrink when a larger score comes.
static inline void look(const float *restrict query, const float *restrict key_pages, const float *restrict value_pages,
                        const Int *restrict blocks, float *restrict out, Int keys, Int size, Int width)
{
    float scores[size], root = 1.0f / sqrtf((float)width), most = -INFINITY, sum = 0.0f;
    for (Int i = 0; i < width; i++) out[i] = 0.0f;
    for (Int first = 0; first < keys; first += size) {
        Int count = keys - first < size ? keys - first : size, at = blocks[first / size] * size * width;
        const float *key = key_pages + at, *value = value_pages + at;
        float before = most;
        for (Int i = 0; i < count; i++, key += width) {
            scores[i] = dot(query, key, width) * root;
            most = scores[i] > most ? scores[i] : most;
        }
        float kept = power(before - most);
        sum *= kept;
        for (Int i = 0; i < width; i++) out[i] *= kept;
        for (Int i = 0; i < count; i++) scores[i] = power(scores[i] - most);
        for (Int i = 0; i < count; i++, value += width) {
            sum += scores[i];
            for (Int j = 0; j < width; j++) out[j] += scores[i] * value[j];
        }
    }
    for (Int i = 0; i < width; i++) out[i] /= sum;
}

void attend(Int rows, Int generating, Int heads, Int kv_heads, Int width, Int blocks, Int size, Int table, float epsilon,
            const float *turns, const Int *positions, const Int *tables, const Int *slots, float *pages,
            float *qkv, const float *gains, float *seen)
{
    Int of_row = (heads + 2 * kv_heads) * width, of_head = blocks * size * width;
    for (Int row = 0; row < rows; row++) {
        Int position = positions[row], block = tables[slots[row] * table + position / size];
        float *head = qkv + row * of_row, *place = pages + (block * size + position % size) * width;
        for (Int h = 0; h < heads + 2 * kv_heads; h++, head += width) {
            if (h < heads + kv_heads)
                rotate(head, gains ? gains + h * width : NULL, turns + position * width, width, epsilon);
            if (h >= heads) memcpy(place + (h - heads) * of_head, head, width * sizeof(float));
        }
    }
    #pragma omp parallel for collapse(2) if (generating && generating * heads * width * positions[0] > WORTH_SHARING)
    for (Int row = 0; row < generating; row++)
        for (Int h = 0; h < heads; h++) {
            const float *keys = pages + h / (heads / kv_heads) * of_head;
            const float *query = qkv + row * of_row + h * width, *values = keys + kv_heads * of_head;
            const Int *mine = tables + slots[row] * table;
            float *out = seen + (row * heads + h) * width;
            switch (width) {  // a quarter less time where the compiler knows how long its loops are
            case 32: look(query, keys, values, mine, out, positions[row] + 1, size, 32); break;
            case 64: look(query, keys, values, mine, out, positions[row] + 1, size, 64); break;
            default: look(query, keys, values, mine, out, positions[row] + 1, size, width);
            }
        }
}
