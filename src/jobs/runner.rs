//! The threads that do the work: claim, run, write, resume.
