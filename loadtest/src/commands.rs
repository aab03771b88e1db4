//! The commands of the program, a file each: arguments, checks of them, and what is printed.
//! `measure` has the arguments that several commands share.

pub(crate) mod measure;
pub(crate) mod origin;
pub(crate) mod constant_response;
pub(crate) mod byte_relay;
pub(crate) mod knee;
pub(crate) mod faults;
pub(crate) mod field_cases;
pub(crate) mod fleet;
pub(crate) mod restarts;
pub(crate) mod scenario;
pub(crate) mod bench;
