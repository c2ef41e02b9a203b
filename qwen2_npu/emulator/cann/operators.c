/* Operators that torch_npu's own C++ gives to CANN without passing PyTorch's dispatcher, where the emulator would meet
 * them: an all_gather of lists pads what it sends to 512 bytes by PadV3, and fills what it receives into by Fill.
 *
 * Signatures follow CANN's acl_base.h and acl_op_compiler.h.
 */
#include "emulator.h"

typedef struct {
    void *data;
    size_t size;
} Buffer;

Buffer *aclCreateDataBuffer(void *data, size_t size) {
    Buffer *made = malloc(sizeof *made);
    if (made) *made = (Buffer){data, size};
    return made;
}

aclError aclDestroyDataBuffer(const Buffer *buffer) { free((void *)buffer); return OK; }

/* inputs: the shape, which the output's buffer tells too, and the value. */
static aclError fill(int inputs, Buffer *const input[], Buffer *const output[]) {
    if (inputs != 2 || !input[1]->size || output[0]->size % input[1]->size)
        return emu_fail(ERROR_INVALID_PARAM, "operator Fill was given what the emulator does not expect");
    size_t step = input[1]->size;
    for (size_t at = 0; at < output[0]->size; at += step) memcpy((char *)output[0]->data + at, input[1]->data, step);
    return OK;
}

/* inputs: x, pairs of int32 widths, the value. Only a tail is added: everything else changes no byte's place. */
static aclError pad(int inputs, Buffer *const input[], Buffer *const output[]) {
    const Buffer *x = input[0], *value = inputs == 3 ? input[2] : NULL, *y = output[0];
    const int32_t *widths = input[1]->data;
    size_t last = input[1]->size / sizeof *widths - 1;
    int plain = value && value->size;
    for (size_t i = 0; i < last; i++) plain = plain && widths[i] == 0;
    if (!plain || widths[last] < 0 || y->size != x->size + (size_t)widths[last] * value->size)
        return emu_fail(ERROR_INVALID_PARAM, "operator PadV3 was given what the emulator does not expect");
    memcpy(y->data, x->data, x->size);
    for (size_t at = x->size; at < y->size; at += value->size) memcpy((char *)y->data + at, value->data, value->size);
    return OK;
}

aclError aclopCompileAndExecute(const char *name, int inputs, UNUSED const void *const input_desc[],
                                Buffer *const input[], UNUSED int outputs, UNUSED const void *const output_desc[],
                                Buffer *const output[]) {
    if (!strcmp(name, "Fill")) return fill(inputs, input, output);
    if (!strcmp(name, "PadV3")) return pad(inputs, input, output);
    return emu_fail(ERROR_EXECUTE, "operator %s reached CANN, which the emulator does not have", name);
}

aclError aclopCompileAndExecuteV2(const char *name, int inputs, const void *const input_desc[], Buffer *const input[],
                                  int outputs, const void *const output_desc[], Buffer *const output[]) {
    return aclopCompileAndExecute(name, inputs, input_desc, input, outputs, output_desc, output);
}
