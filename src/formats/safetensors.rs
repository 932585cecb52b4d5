//! safetensors files: single and sharded, memory-mapped in, streamed out.
