//! Sets `TIDEGATE_COMMIT`, the commit that the program is built from, for `--version` and metrics.
//!
//! It is the variable of the same name, or else the commit that the repository has checked out.
//! Only release builds ask the repository: in others, each commit would make all tests link again.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=TIDEGATE_COMMIT");
    let given = std::env::var("TIDEGATE_COMMIT").ok().filter(|commit| is_plain(commit));
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = given.or_else(|| if is_release { checked_out() } else { None });
    println!("cargo:rustc-env=TIDEGATE_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

/// The commit of the repository. The build script runs again when another one is checked out.
fn checked_out() -> Option<String> {
    let head = git(&["rev-parse", "--git-path", "HEAD"])?;
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    let branch = branch.and_then(|branch| git(&["rev-parse", "--git-path", &branch]));
    let packed = git(&["rev-parse", "--git-path", "packed-refs"]);
    // A file that does not exist would make every build run the script.
    for path in [Some(head), branch, packed].into_iter().flatten().filter(|path| Path::new(path).exists()) {
        println!("cargo:rerun-if-changed={path}");
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned()).filter(|text| is_plain(text))
}

/// Whether a text is one line that cargo reads as it is.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && !text.contains(char::is_control)
}
