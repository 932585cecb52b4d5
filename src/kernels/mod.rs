//! CPU kernels with runtime dispatch. The only room with `unsafe`.
