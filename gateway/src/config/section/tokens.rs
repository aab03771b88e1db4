//! `identity.user.jwt`: which tokens are believed, and the file with the keys they are verified with.

use std::time::Duration;

use super::super::expand::read_file;
use super::super::fault::{Code, Problem};
use super::super::kind::{Choice, ListOf, Parsed, Span, Text};
use super::super::table::Table;
use super::forms;
use crate::identify::Source;
use crate::identify::keys::Keys;
use crate::identify::tokens::{Algorithm, AlgorithmFamily, Place, Settings};

/// Clocks that are further apart are to be set, not tolerated.
const LEEWAY_MAX: Duration = Duration::from_secs(300);

/// Without an issuer's name for it, a subject is who a token is about (RFC 7519 section 4.1.2).
const USER: &str = "sub";

const ALGORITHM: Choice<Algorithm> = Choice(&[
    ("RS256", Some(Algorithm::RS256)),
    ("RS384", Some(Algorithm::RS384)),
    ("RS512", Some(Algorithm::RS512)),
    ("PS256", Some(Algorithm::PS256)),
    ("PS384", Some(Algorithm::PS384)),
    ("PS512", Some(Algorithm::PS512)),
    ("ES256", Some(Algorithm::ES256)),
    ("ES384", Some(Algorithm::ES384)),
    ("EdDSA", Some(Algorithm::EdDSA)),
    ("HS256", Some(Algorithm::HS256)),
    ("HS384", Some(Algorithm::HS384)),
    ("HS512", Some(Algorithm::HS512)),
]);

pub(super) const CLAIM: Parsed<String> = Parsed { name: "the name of a claim", parse: claim, show: String::clone };

const AUDIENCE: Parsed<String> = Parsed { name: "a value of `aud`", parse: claim, show: String::clone };

const PLACE: Parsed<Place> =
    Parsed { name: "\"bearer\", \"header:NAME\" or \"cookie:NAME\"", parse: place, show: show_place };

/// The table in the place of a user's header: the claim that names the user, and the tokens that may have it.
pub(super) fn read(user: &Table<'_>) -> Option<(Source, Settings)> {
    let read = user.some_table("jwt", jwt);
    if read.is_none() {
        let problem = Problem::new(Code::Missing, "`jwt` is missing");
        let hint = "write { jwt = { keys = \"jwks.json\", algorithms = [\"ES256\"], claim = \"sub\" } }";
        user.reading.error(&user.at, problem.hint(hint));
    }
    read.flatten()
}

fn jwt(table: &Table<'_>) -> Option<(Source, Settings)> {
    let path = table.required("keys", &Text);
    let algorithms = table.required("algorithms", &ListOf { item: ALGORITHM, least: 1 });
    let user = table.or("claim", &CLAIM, USER.to_owned());
    let issuer = table.optional("issuer", &Text).map(|issuer| issuer.value);
    let audience = forms::list(table, "audience", AUDIENCE, Vec::new());
    let leeway = table.or("leeway", &Span(Duration::ZERO..=LEEWAY_MAX), Settings::LEEWAY);
    let place = table.or("token", &PLACE, Place::default());
    let (path, algorithms) = (path?, algorithms?);
    let (values, at) = (algorithms.value, algorithms.at);
    let algorithms: Vec<Algorithm> = values.into_iter().map(|algorithm| algorithm.value).collect();
    let is_secret = |algorithm: &Algorithm| algorithm.family() == AlgorithmFamily::Hmac;
    if algorithms.iter().any(is_secret) && !algorithms.iter().all(is_secret) {
        let problem = Problem::bad("algorithms with a secret (HS) and with public keys do not go together");
        let hint = "who can read a public key could sign with it, if it were ever taken for a secret";
        table.reading.error(&at, problem.hint(hint));
        return None;
    }
    // Each item has been complained about.
    if algorithms.is_empty() {
        return None;
    }
    let text = read_file(&table.reading.values, &path.value).map_err(|problem| table.reading.error(&path.at, problem));
    let keys = Keys::read(&text.ok()?, &algorithms).map_err(|error| {
        let problem = Problem::new(Code::File, format!("cannot use {}: {error}", path.value));
        table.reading.error(&path.at, problem.hint("it is a JWK set (RFC 7517): { \"keys\": [{ \"kty\": ... }] }"));
    });
    let keys = keys.ok()?;
    if keys.has_private() {
        let problem = Problem::new(Code::Risk, "the file has a private key, which only the issuer should have");
        table.reading.warning(&path.at, problem.hint("leave out the members `d`, `p`, `q`, `dp`, `dq` and `qi`"));
    }
    Some((Source::Claim(user), Settings { keys, place, issuer, audience, leeway }))
}

fn claim(text: &str) -> Result<String, Problem> {
    if text.is_empty() { Err(Problem::bad("the text is empty")) } else { Ok(text.to_owned()) }
}

fn place(text: &str) -> Result<Place, Problem> {
    match text.split_once(':') {
        None if text == "bearer" => Ok(Place::Bearer),
        Some(("header", name)) => Ok(Place::Header(forms::field(name)?)),
        Some(("cookie", name)) => Ok(Place::Cookie(forms::cookie(name)?)),
        _ => Err(Problem::bad(format!("`{text}` is no place of a token")).hint(format!("write {}", PLACE.name))),
    }
}

fn show_place(place: &Place) -> String {
    match place {
        Place::Bearer => "bearer".to_owned(),
        Place::Header(name) => format!("header:{name}"),
        Place::Cookie(name) => format!("cookie:{name}"),
    }
}
