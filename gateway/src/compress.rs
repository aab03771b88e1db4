//! Compression of response bodies for clients: which coding, which responses, and the encoders.
//!
//! Invariants: a body that may carry a secret beside what a client chose is not compressed unless
//! the route says so (the BREACH attack); memory and time of one encoder are bounded.

mod accept_encoding;
mod eligibility;
mod encoder;
mod body;

pub(crate) use accept_encoding::preferred_coding;
pub(crate) use body::{CompressedBody, FlushPolicy, count_input, expose};
pub(crate) use eligibility::{CompressConfig, TypePattern, describe_form, mark_variant, write_coding};
pub(crate) use encoder::{Effort, compress_whole};
