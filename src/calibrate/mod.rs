//! Running text through a model block by block and collecting statistics of every linear's input.
