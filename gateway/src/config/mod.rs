//! The configuration: one document, TOML or JSON, read whole and checked whole.
//!
//! Reading has four steps, each in its own file: `document` (a tree with byte spans), `section`
//! (each key parsed into the type of the module that owns it), `check` (constraints between several
//! keys) and [`ConfigReport`] (all faults, if there are any). No step opens a socket or a log. A
//! [`Config`] needs no further checking.

mod fault;
mod model;
mod expand;
mod own_machine;
mod read_context;
mod suggestion;
mod node;
mod units;
mod value_kind;
mod constraints;
mod table_reader;
mod section;
mod no_effect;
mod check;
mod json;
mod document;
#[cfg(test)]
mod tests;
mod print;
mod load;
mod reference;
mod schema;

pub use print::PrintOptions;
pub use schema::schema;

pub use document::{ConfigDocument, DocumentFormat};
pub use fault::{ConfigFault, ConfigReport, FaultCode, FaultSeverity};
pub use model::{Config, LogConfig, ServerConfig};
pub(crate) use model::{ConfigFile, FileDigest, digest};
