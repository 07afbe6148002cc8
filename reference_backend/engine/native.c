// The small operations of a layer on a CPU: float32, one thread. native.py builds and calls them, and says what each gives.
// NaN passes through: what a request has spoilt must be seen in its scores.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Int;

// e to the x, for x <= 88, to about two units in the last place: 2^n is put into the exponent, the rest is a polynomial (Cephes' expf).
static inline float power(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } scale = {.bits = ((int32_t)n + 127) << 23};
    return p * scale.value;
}

static inline float product(const float *restrict a, const float *restrict b, Int width)
{
    float sum = 0.0f;
    for (Int i = 0; i < width; i++) sum += a[i] * b[i];
    return sum;
}

// y = x over the root of its sum of squares plus epsilon; rows of x [rows, width].
void norm(const float *restrict x, float *restrict y, Int rows, Int width, float epsilon)
{
    for (; rows--; x += width, y += width) {
        float factor = 1.0f / sqrtf(product(x, x, width) + epsilon);
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
        float factor = 1.0f / sqrtf(product(head, head, width) + epsilon);
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
    float scores[size], sums[width], root = 1.0f / sqrtf((float)width), most = -INFINITY, sum = 0.0f;
    for (Int i = 0; i < width; i++) sums[i] = 0.0f;
    for (Int first = 0; first < keys; first += size) {
        Int count = keys - first < size ? keys - first : size, at = blocks[first / size] * size * width;
        const float *key = key_pages + at, *value = value_pages + at;
        float before = most;
        for (Int i = 0; i < count; i++, key += width) {
            scores[i] = product(query, key, width) * root;
            most = scores[i] > most ? scores[i] : most;
        }
        float kept = power(before - most);
        sum *= kept;
        for (Int i = 0; i < width; i++) sums[i] *= kept;
        for (Int i = 0; i < count; i++) scores[i] = power(scores[i] - most);
        for (Int i = 0; i < count; i++, value += width) {
            sum += scores[i];
            for (Int j = 0; j < width; j++) sums[j] += scores[i] * value[j];
        }
    }
    for (Int i = 0; i < width; i++) out[i] = sums[i] / sum;
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
    for (Int row = 0; row < generating; row++)
        for (Int h = 0; h < heads; h++) {
            const float *keys = pages + h / (heads / kv_heads) * of_head;
            const float *query = qkv + row * of_row + h * width, *values = keys + kv_heads * of_head;
            const Int *mine = tables + slots[row] * table;
            float *out = seen + (row * heads + h) * width;
            switch (width) {  // sums stay in registers where the compiler knows how many there are
            case 32: look(query, keys, values, mine, out, positions[row] + 1, size, 32); break;
            case 64: look(query, keys, values, mine, out, positions[row] + 1, size, 64); break;
            default: look(query, keys, values, mine, out, positions[row] + 1, size, width);
            }
        }
}
