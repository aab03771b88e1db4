//! Processes on this machine and what they cost: the external programs and their cores (`tools`),
//! children that end with their owner (`child`), the `template` of a configuration file, CPU time,
//! system calls and instructions.

pub(crate) mod cpu_time;
pub(crate) mod system_calls;
pub(crate) mod tools;
pub(crate) mod child;
pub(crate) mod instructions;
pub(crate) mod template;
