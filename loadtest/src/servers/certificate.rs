//! The certificate of the servers that speak TLS: self-signed, with a P-256 key, and no authority,
//! so that each client can trust it as it is.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::{LoadtestError, Result};
use crate::process::child::ScratchDirectory;
use crate::process::tools::{Tool, Tools};

/// The name in the certificate that clients verify.
pub(crate) const NAME: &str = "localhost";
const OPENSSL: &str = "\
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = localhost
[extensions]
subjectAltName = IP:127.0.0.1, DNS:localhost
basicConstraints = critical, CA:FALSE
";

/// Files of a certificate and its key.
pub(crate) struct ServerCertificate {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// Both in one file, as HAProxy expects.
    pub(crate) both: PathBuf,
}

impl ServerCertificate {
    pub(crate) fn create(tools: &Tools, scratch: &ScratchDirectory) -> Result<Self> {
        let [certificate, key] = ["server.crt", "server.key"].map(|name| scratch.path().join(name));
        let mut openssl = Command::new(tools.path(Tool::Openssl));
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        let config = scratch.write("openssl.cnf", OPENSSL)?;
        openssl.args(["-days", "30", "-config"]).arg(config);
        openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate).stdin(Stdio::null());
        let output = openssl.output().map_err(LoadtestError::io("cannot start openssl"))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(LoadtestError::Unexpected { file: "the output of openssl".to_owned(), text });
        }
        let read = |path: &PathBuf| {
            fs::read_to_string(path).map_err(LoadtestError::io(format!("cannot read {}", path.display())))
        };
        let both = scratch.write("server.pem", &(read(&certificate)? + &read(&key)?))?;
        Ok(ServerCertificate { certificate, key, both })
    }
}
