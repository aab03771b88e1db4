//! Files that no process may read: pipes, which block, and files without an end.

use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use super::super::load::parse_for_purposes;
use super::super::{ConfigFile, DocumentFormat};
use super::{MINIMAL, lines};

/// A directory with a pipe that has no writer, and a large file without content.
fn directory() -> PathBuf {
    let directory = std::env::temp_dir().join(format!("tidegate-irregular-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    let pipe = directory.join("pipe");
    if !pipe.exists() {
        assert!(
            Command::new("sh").args(["-c", "mkfifo pipe"]).current_dir(&directory).status().expect("a shell").success()
        );
    }
    assert!(std::fs::metadata(&pipe).expect("a pipe").file_type().is_fifo());
    let large = std::fs::File::create(directory.join("large")).expect("the temporary directory is writable");
    large.set_len(8 << 30).expect("a sparse file");
    directory
}

/// Each key, the text that sets it to a file, and the faults.
#[test]
fn pipes_devices_and_large_files_are_refused_unread() {
    let directory = directory();
    let listen = |tls: &str| format!("[[listen]]\naddress = \"127.0.0.1:1\"\ntls = {{ {tls} }}\n");
    let upstream = |tls: &str| {
        format!(
            "[upstreams.b]\nendpoints = [\"https://a\"]\ntls = {{ {tls} }}\n[[routes]]\nname = \"b\"\nmatch = {{ path = \"/b\" }}\nupstream = \"b\"\n"
        )
    };
    for file in ["pipe", "large", "/dev/zero"] {
        for text in [
            listen(&format!("certificates = [{{ cert = \"{file}\", key = \"{file}\" }}]")),
            listen(&format!("client_ca = \"{file}\"")),
            listen(&format!("client_ca = \"{file}\", client_crl = \"{file}\"")),
            upstream(&format!("ca = \"{file}\"")),
            upstream(&format!("cert = \"{file}\", key = \"{file}\"")),
            format!("[admin]\ntoken = \"${{file:{file}}}\"\n"),
            format!("[identity.geoip]\ndatabase = \"{file}\"\nregions = {{ north = [\"DE\"] }}\n"),
        ] {
            let (sender, receiver) = mpsc::channel();
            let (base, text) = (directory.clone(), format!("{MINIMAL}{text}"));
            let document = text.clone();
            std::thread::spawn(move || {
                for report in parse_for_purposes(&base, &document, DocumentFormat::Toml) {
                    drop(sender.send(lines(&report)));
                }
            });
            for _ in 0..2 {
                let found =
                    receiver.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("it hangs: {text}"));
                let is_named =
                    |fault: &String| ["not a regular file", "larger than"].iter().any(|reason| fault.contains(reason));
                assert!(found.iter().any(is_named), "{text}: {found:#?}");
            }
        }
        let path = directory.join(file);
        assert!(file == "large" || ConfigFile::before_use(&path).contents.is_none());
    }
    std::fs::remove_dir_all(&directory).expect("it was created here");
}
