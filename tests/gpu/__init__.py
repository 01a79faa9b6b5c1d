"""What needs a GPU, or stands in for one: onnxruntime-gpu on a stub of CUDA, and WebGPU."""
