//! Which weights a method touches: name patterns over the linear weights of the blocks.
