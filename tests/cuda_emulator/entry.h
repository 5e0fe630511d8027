// Appended to a kernel's source: KLAB_NAME is its function. Calls it with arguments given by address, and says what they are.
// Nothing here touches memory that the instrumentation would see, but for `call`, which is exempt.
#pragma once

namespace klab::emulator {

// What the launch must pass for a parameter of this type; the const of a pointer's target does not matter.
template <class T> struct Parameter;
template <> struct Parameter<int> { static constexpr const char* is = "int"; };
template <> struct Parameter<int64_t> { static constexpr const char* is = "int64_t"; };
template <> struct Parameter<float> { static constexpr const char* is = "float"; };
template <> struct Parameter<half_t*> { static constexpr const char* is = "float16 tensor"; };
template <> struct Parameter<bf16_t*> { static constexpr const char* is = "bfloat16 tensor"; };
template <> struct Parameter<float*> { static constexpr const char* is = "float32 tensor"; };
template <> struct Parameter<int*> { static constexpr const char* is = "int32 tensor"; };
template <> struct Parameter<int64_t*> { static constexpr const char* is = "int64 tensor"; };
template <> struct Parameter<uint8_t*> { static constexpr const char* is = "uint8 tensor"; };
template <> struct Parameter<void*> { static constexpr const char* is = "tensor"; };
template <class T> struct Parameter<const T*> : Parameter<T*> {};
#if defined(KLAB_TENSOR_MAP)
template <> struct Parameter<TensorMap> { static constexpr const char* is = "tensor map"; };
#endif

template <class... P>
struct Signature {
    static constexpr const char* parameters[] = {Parameter<P>::is..., nullptr};
};
template <class... P>
const char* const* signature(void (*)(P...)) { return Signature<P...>::parameters; }

template <class... P, std::size_t... I>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(args[I])...);
}
template <class... P>
void call(void (*kernel)(P...), void** args) { call(kernel, args, std::index_sequence_for<P...>{}); }

}  // namespace klab::emulator

extern "C" void klab_entry(void** args) { klab::emulator::call(KLAB_NAME, args); }
extern "C" const char* const* klab_signature() { return klab::emulator::signature(KLAB_NAME); }
