/* What custom operators need of onnxruntime's C interface, declared here because its packages bring
 * no headers. That interface is a table of functions, which only grows: a function keeps its
 * number. The struct of an operator begins with the version whose fields it has: 18, which every
 * onnxruntime from 1.18 on reads. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { INTERFACE_VERSION = 18 };
enum { FLOAT = 1, UINT8 = 2, INT64 = 7 }; /* ONNX's numbers of types */
enum { FAIL = 1, INVALID_ARGUMENT = 2 }; /* error codes */

typedef struct Status Status; /* NULL where all went well */
typedef struct Value Value;
typedef struct Shape Shape;
typedef struct KernelInfo KernelInfo;
typedef struct Context Context;
typedef void *const *Interface;

typedef struct {
  Interface (*get)(uint32_t version);
  const char *(*version)(void);
} InterfaceBase;

#define ORT(number, result, ...) ((result(*)(__VA_ARGS__))ort[number])
#define create_status ORT(0, Status *, int, const char *)
#define create_domain ORT(26, Status *, const char *, void **)
#define add_to_domain ORT(27, Status *, void *, const void *)
#define add_domain ORT(28, Status *, void *, void *)
#define tensor_data ORT(51, Status *, Value *, void **)
#define shape_rank ORT(61, Status *, const Shape *, size_t *)
#define shape_sizes ORT(62, Status *, const Shape *, int64_t *, size_t)
#define tensor_shape ORT(65, Status *, const Value *, Shape **)
#define attribute_int ORT(86, Status *, const KernelInfo *, const char *, int64_t *)
#define context_input ORT(90, Status *, const Context *, size_t, const Value **)
#define context_output ORT(91, Status *, Context *, size_t, const int64_t *, size_t, Value **)
#define release_status ORT(93, void, Status *)
#define release_shape ORT(99, void, Shape *)
#define attribute_ints ORT(163, Status *, const KernelInfo *, const char *, int64_t *, size_t *)
#define parallel_for \
  ORT(274, Status *, const Context *, void (*)(void *, size_t), size_t, size_t, void *)

typedef struct Operator Operator;
struct Operator {
  uint32_t version;
  void *(*create_v1)(const Operator *, Interface, const KernelInfo *);
  const char *(*name)(const Operator *);
  const char *(*provider)(const Operator *);
  int (*input_type)(const Operator *, size_t);
  size_t (*input_count)(const Operator *);
  int (*output_type)(const Operator *, size_t);
  size_t (*output_count)(const Operator *);
  void (*compute_v1)(void *, Context *);
  void (*destroy)(void *);
  int (*input_is_optional)(const Operator *, size_t);
  int (*output_is_optional)(const Operator *, size_t);
  int (*input_memory)(const Operator *, size_t);
  int (*variadic[4])(const Operator *);
  Status *(*create)(const Operator *, Interface, const KernelInfo *, void **);
  Status *(*compute)(void *, Context *);
  Status *(*infer_shape)(const Operator *, void *);
  int (*first_version)(const Operator *);
  int (*last_version)(const Operator *);
  size_t (*in_place)(int **inputs, int **outputs);
  void (*release_in_place)(int *inputs, int *outputs);
  size_t (*aliases)(int **inputs, int **outputs);
  void (*release_aliases)(int *inputs, int *outputs);
};
