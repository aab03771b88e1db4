//! `identity.user` and `identity.tier` as tables: tokens, and the file with their keys.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use super::super::{Config, Format, Report};
use super::{LEAST, lines, read_in};
use crate::identify::Source;
use crate::identify::issuer::{Issuer, set};
use crate::identify::tokens::{Algorithm, Place, Settings};

/// A directory with sets of keys: `ec.json`, `secret.json`, `both.json`, `private.json` and what is no set.
static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let directory = std::env::temp_dir().join(format!("tidegate-keys-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    let (ec, secret) = (Issuer::new(Algorithm::ES256, "pub"), Issuer::new(Algorithm::HS256, "sec"));
    let mut private = Issuer::new(Algorithm::ES256, "mine");
    private.jwk["d"] = "AAAA".into();
    for (name, text) in [
        ("ec.json", set(&[&ec])),
        ("secret.json", set(&[&secret])),
        ("both.json", set(&[&ec, &secret])),
        ("private.json", set(&[&private])),
        ("empty.json", set(&[])),
        ("ec.pem", "-----BEGIN PUBLIC KEY-----".to_owned()),
    ] {
        std::fs::write(directory.join(name), text).expect("the temporary directory is writable");
    }
    directory
});

fn read(identity: &str) -> Result<(Config, Report), Report> {
    read_in(&DIRECTORY, &format!("{LEAST}[identity]\n{identity}\n"), Format::Toml)
}

/// Everything that is said of `[identity]` with these lines, the first of which is the tenth of the document.
fn said(identity: &str) -> Vec<String> {
    lines(&match read(identity) {
        Ok((_, warnings)) => warnings,
        Err(report) => report,
    })
}

#[test]
fn what_no_token_could_be_believed_by_is_refused() {
    let form = "it is a JWK set (RFC 7517): { \"keys\": [{ \"kty\": ... }] }";
    for (identity, want) in [
        (
            "user = {}",
            "10:8 identity.user: `jwt` is missing (write { jwt = { keys = \"jwks.json\", algorithms = [\"ES256\"], claim = \"sub\" } })",
        ),
        (
            "user = { jwt = { keys = \"ec.json\" } }",
            "10:16 identity.user.jwt.algorithms: `algorithms` is missing (it takes a list, at least one; each item: one of",
        ),
        (
            "user = { jwt = { algorithms = [\"ES256\"] } }",
            "10:16 identity.user.jwt.keys: `keys` is missing (it takes text)",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], algorithm = \"none\" } }",
            "10:60 identity.user.jwt.algorithm: unknown key `algorithm` (did you mean `algorithms`?)",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"] }, api_key = 1 }",
            "10:62 identity.user.api_key: unknown key `api_key`",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"none\"] } }",
            "10:50 identity.user.jwt.algorithms[0]: \"none\" is not a choice here",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [] } }",
            "10:49 identity.user.jwt.algorithms: the list needs at least one item",
        ),
        (
            "user = { jwt = { keys = \"both.json\", algorithms = [\"HS256\", \"ES256\"] } }",
            "10:51 identity.user.jwt.algorithms: algorithms with a secret (HS) and with public keys do not go together (who can \
             read a public key could sign with it, if it were ever taken for a secret)",
        ),
        (
            "user = { jwt = { keys = \"both.json\", algorithms = [\"ES256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use both.json: key `sec` is a secret (`oct`), and the algorithms are for public keys",
        ),
        (
            "user = { jwt = { keys = \"both.json\", algorithms = [\"HS256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use both.json: key `pub` is a public key, and the algorithms are for secrets (`oct`)",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"RS256\"] } }",
            &format!(
                "10:25 identity.user.jwt.keys: cannot use ec.json: no key in it is for the algorithms that are allowed ({form})"
            ),
        ),
        (
            "user = { jwt = { keys = \"empty.json\", algorithms = [\"RS256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use empty.json: no key in it is for the algorithms that are allowed",
        ),
        (
            "user = { jwt = { keys = \"ec.pem\", algorithms = [\"ES256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use ec.pem: it is no JWK set: ",
        ),
        (
            "user = { jwt = { keys = \"absent.json\", algorithms = [\"ES256\"] } }",
            "10:25 identity.user.jwt.keys: cannot read ",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], claim = \"\" } }",
            "10:68 identity.user.jwt.claim: the text is empty",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], leeway = \"1h\" } }",
            "10:69 identity.user.jwt.leeway: out of range: expected a duration, 0s to 5m",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], token = \"query:t\" } }",
            "10:68 identity.user.jwt.token: `query:t` is no place of a token (write \"bearer\", \"header:NAME\" or \"cookie:NAME\")",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], token = \"cookie:a b\" } }",
            "10:68 identity.user.jwt.token: `a b` is not a cookie's name",
        ),
        (
            "tier = { jwt_claim = \"tier\" }",
            "10:22 identity.tier.jwt_claim: there is no token to read it from (a tier from a token needs `identity.user = { jwt = { ... } }`)",
        ),
        (
            "trusted_proxies = [\"::1\"]\nuser = \"header:x-u\"\ntier = { jwt_claim = \"tier\" }",
            "12:22 identity.tier.jwt_claim: there is no token to read it from",
        ),
        (
            "tier = { claim = \"tier\" }",
            "10:8 identity.tier.jwt_claim: `jwt_claim` is missing (it takes the name of a claim)",
        ),
    ] {
        let said = said(identity);
        assert!(said.iter().any(|said| said.starts_with(want)), "{said:#?}\n{want}");
        assert!(read(identity).is_err(), "{identity}");
    }
}

#[test]
fn a_private_key_is_a_surprise() {
    let said = said("user = { jwt = { keys = \"private.json\", algorithms = [\"ES256\"] } }");
    assert_eq!(
        said,
        [
            "10:25 identity.user.jwt.keys: the file has a private key, which only the issuer should have (leave out the members \
             `d`, `p`, `q`, `dp`, `dq` and `qi`)"
        ]
    );
}

#[test]
fn tokens_have_defaults_and_every_key_its_effect() {
    let (config, warnings) = read(
        "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\", \"EdDSA\"] } }\ntier = { jwt_claim = \"https://id.test/tier\" }",
    )
    .unwrap_or_else(|report| panic!("{report}"));
    // Tokens are believed from anybody: no trusted proxies are asked for.
    assert!(warnings.is_empty(), "{warnings}");
    assert_eq!(config.identify.user, Some(Source::Claim("sub".to_owned())));
    assert_eq!(config.identify.tier, Some(Source::Claim("https://id.test/tier".to_owned())));
    assert!(config.files.contains(&DIRECTORY.join("ec.json")), "a change of the keys reloads");
    assert_eq!(&*config.http.dropped_trailers, ["authorization"]);
    let tokens = config.identify.tokens.expect("tokens are believed");
    assert_eq!(tokens.keys.algorithms(), [Algorithm::ES256, Algorithm::EdDSA]);
    let Settings { place, issuer, audience, leeway, .. } = tokens;
    assert_eq!((place, issuer, audience, leeway), (Place::Bearer, None, Vec::new(), Duration::from_secs(30)));
    let (config, _) = read(
        "[identity.user.jwt]\nkeys = \"secret.json\"\nalgorithms = [\"HS256\"]\nclaim = \"uid\"\nissuer = \"https://id.test\"\n\
         audience = [\"shop\"]\nleeway = \"0s\"\ntoken = \"header:X-Token\"",
    )
    .unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(config.identify.user, Some(Source::Claim("uid".to_owned())));
    assert_eq!(&*config.http.dropped_trailers, ["x-token"]);
    let Settings { place, issuer, audience, leeway, .. } = config.identify.tokens.expect("tokens are believed");
    assert_eq!((place, issuer.as_deref()), (Place::Header("x-token".to_owned()), Some("https://id.test")));
    assert_eq!((audience, leeway), (vec!["shop".to_owned()], Duration::ZERO));
}
