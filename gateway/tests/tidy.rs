//! Checks of the sources and documents of the repository.
//!
//! Each check takes text and returns its offences as `file:line: what; why`, so that a test beside
//! it can show that it fails.

mod tidy {
    pub(crate) mod source;
    mod documents;
    mod forbidden;
    mod imports;
    mod programs;
    mod test_run;
    mod words;
}
