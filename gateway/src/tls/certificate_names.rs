//! Subject and subject alternative names of a client certificate, as text.
//!
//! The certificate has been verified, which says nothing about the text in it: the reader of DER is
//! bounded by the certificate, and what it does not understand has no name. Invariant: two
//! different subjects have different texts.

use std::fmt::Write as _;

use super::der::{Der, INTEGER, SEQUENCE};
use crate::peer::CertificateNames;

const OCTET_STRING: u8 = 0x04;
const OBJECT_IDENTIFIER: u8 = 0x06;
const SET: u8 = 0x31;
/// Tag of the extensions in a TBSCertificate (RFC 5280 section 4.1).
const EXTENSIONS: u8 = 0xa3;
/// Tags of the names that are read (RFC 5280 section 4.2.1.6).
const MAIL: u8 = 0x81;
const DNS: u8 = 0x82;
const URI: u8 = 0x86;
/// `id-ce-subjectAltName`, 2.5.29.17.
const SUBJECT_ALT_NAME: [u8; 3] = [0x55, 0x1d, 0x11];

/// The attribute types with a short name (RFC 4514 section 3).
const SHORT_NAMES: [(&[u8], &str); 9] = [
    (&[0x55, 0x04, 0x03], "CN"),
    (&[0x55, 0x04, 0x07], "L"),
    (&[0x55, 0x04, 0x08], "ST"),
    (&[0x55, 0x04, 0x0a], "O"),
    (&[0x55, 0x04, 0x0b], "OU"),
    (&[0x55, 0x04, 0x06], "C"),
    (&[0x55, 0x04, 0x09], "STREET"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x19], "DC"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x01], "UID"),
];

/// The names of a certificate in DER. A part that cannot be read is empty.
pub(super) fn names(certificate: &[u8]) -> CertificateNames {
    let Some((subject, alt_names)) = parts(certificate) else { return CertificateNames::default() };
    CertificateNames {
        subject: distinguished_name(subject).unwrap_or_default().into(),
        san: alt_names.and_then(preferred_name).unwrap_or_default().into(),
    }
}

/// The contents of the subject, and of the subject alternative names.
fn parts(certificate: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let mut fields = Der(Der(certificate).content(SEQUENCE)?);
    let mut fields = Der(fields.content(SEQUENCE)?);
    // The version is optional; it is followed by serial number, algorithm, issuer and validity.
    if fields.0.first() == Some(&0xa0) {
        fields.element()?;
    }
    fields.content(INTEGER)?;
    for _ in 0..3 {
        fields.content(SEQUENCE)?;
    }
    let subject = fields.content(SEQUENCE)?;
    while !fields.0.is_empty() {
        let (tag, content) = fields.element()?;
        if tag == EXTENSIONS {
            return Some((subject, alt_names(content)));
        }
    }
    Some((subject, None))
}

fn alt_names(extensions: &[u8]) -> Option<&[u8]> {
    let mut extensions = Der(Der(extensions).content(SEQUENCE)?);
    while !extensions.0.is_empty() {
        let mut extension = Der(extensions.content(SEQUENCE)?);
        if extension.content(OBJECT_IDENTIFIER)? == SUBJECT_ALT_NAME {
            let (tag, content) = extension.element()?;
            // `critical` may stand before the value.
            let value = if tag == OCTET_STRING { content } else { extension.content(OCTET_STRING)? };
            return Der(value).content(SEQUENCE);
        }
    }
    None
}

/// The first URI, else the first DNS name, else the first mail address.
fn preferred_name(names: &[u8]) -> Option<String> {
    let first = |kind: u8| {
        let mut names = Der(names);
        std::iter::from_fn(|| names.element()).find(|(tag, _)| *tag == kind).and_then(|(_, name)| {
            let is_plain = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
            std::str::from_utf8(name).ok().filter(|_| is_plain)
        })
    };
    let uri = first(URI).map(|name| format!("URI:{name}"));
    let dns = || first(DNS).map(|name| format!("DNS:{}", name.to_ascii_lowercase()));
    uri.or_else(dns).or_else(|| first(MAIL).map(|name| format!("email:{name}")))
}

/// The string form of a name (RFC 4514 section 2): the last relative name first.
fn distinguished_name(name: &[u8]) -> Option<String> {
    let mut text = String::new();
    let mut relative_names = Vec::new();
    let mut rest = Der(name);
    while !rest.0.is_empty() {
        relative_names.push(rest.content(SET)?);
    }
    for (at, relative_name) in relative_names.iter().rev().enumerate() {
        let mut attributes = Der(relative_name);
        let mut separator = if at > 0 { "," } else { "" };
        while !attributes.0.is_empty() {
            text.push_str(separator);
            push_attribute(&mut text, attributes.content(SEQUENCE)?)?;
            separator = "+";
        }
    }
    Some(text)
}

fn push_attribute(text: &mut String, attribute: &[u8]) -> Option<()> {
    let mut attribute = Der(attribute);
    let kind = attribute.content(OBJECT_IDENTIFIER)?;
    let encoded = attribute.0;
    let (tag, value) = attribute.element()?;
    let short_name = SHORT_NAMES.iter().find(|(known, _)| *known == kind);
    match short_name {
        Some((_, name)) => text.push_str(name),
        None => push_dotted(text, kind)?,
    }
    text.push('=');
    match directory_string(tag, value).filter(|_| short_name.is_some()) {
        Some(value) => push_escaped(text, value),
        None => {
            // The whole encoding of the value, with its type (section 2.4).
            let encoded = &encoded[..encoded.len() - attribute.0.len()];
            text.push('#');
            encoded.iter().try_for_each(|byte| write!(text, "{byte:02x}")).ok()?;
        }
    }
    Some(())
}

/// The text of the string types that are subsets of UTF-8.
fn directory_string(tag: u8, value: &[u8]) -> Option<&str> {
    match tag {
        // UTF8String.
        0x0c => std::str::from_utf8(value).ok(),
        // NumericString, PrintableString, IA5String, VisibleString.
        0x12 | 0x13 | 0x16 | 0x1a if value.is_ascii() => std::str::from_utf8(value).ok(),
        _ => None,
    }
}

fn push_escaped(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (at, character) in value.chars().enumerate() {
        match character {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => text.extend(['\\', character]),
            ' ' if at == 0 || at == last => text.push_str("\\ "),
            '#' if at == 0 => text.push_str("\\#"),
            character if character.is_ascii_control() => {
                // Writing to a string does not fail.
                let _infallible = write!(text, "\\{:02x}", u32::from(character));
            }
            character => text.push(character),
        }
    }
}

/// An object identifier in dotted form; `None` if a number of it has more than 64 bits.
fn push_dotted(text: &mut String, identifier: &[u8]) -> Option<()> {
    let mut is_first = true;
    let mut number = 0_u64;
    for byte in identifier {
        number = number.checked_mul(128)?.checked_add(u64::from(byte & 0x7f))?;
        if byte & 0x80 != 0 {
            continue;
        }
        if std::mem::take(&mut is_first) {
            let root = (number / 40).min(2);
            write!(text, "{root}.{}", number - root * 40).ok()?;
        } else {
            write!(text, ".{number}").ok()?;
        }
        number = 0;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType};

    use super::*;

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateNames {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        names(params.self_signed(&key).expect("a certificate").der())
    }

    fn subject(attributes: &[(DnType, DnValue)]) -> String {
        certificate(|params| {
            for (kind, value) in attributes {
                params.distinguished_name.push(kind.clone(), value.clone());
            }
        })
        .subject
        .into()
    }

    fn utf8(text: &str) -> DnValue {
        DnValue::Utf8String(text.to_owned())
    }

    #[test]
    fn subject_is_written_as_in_rfc_4514() {
        let mail = DnType::CustomDnType(vec![1, 2, 840, 113_549, 1, 9, 1]);
        for (attributes, expected) in [
            (vec![], ""),
            (vec![(DnType::CommonName, utf8("ann"))], "CN=ann"),
            (
                vec![
                    (DnType::CountryName, DnValue::PrintableString("CH".try_into().expect("printable"))),
                    (DnType::OrganizationName, utf8("Test")),
                    (DnType::OrganizationalUnitName, utf8("Sales")),
                    (DnType::CommonName, utf8("Ann Lee")),
                ],
                "CN=Ann Lee,OU=Sales,O=Test,C=CH",
            ),
            (vec![(DnType::CommonName, utf8("James \"Jim\" Smith, III"))], "CN=James \\\"Jim\\\" Smith\\, III"),
            (vec![(DnType::CommonName, utf8(" #a+b;<c>\\ "))], "CN=\\ #a\\+b\\;\\<c\\>\\\\\\ "),
            (vec![(DnType::CommonName, utf8("#a b"))], "CN=\\#a b"),
            (vec![(DnType::CommonName, utf8(" "))], "CN=\\ "),
            (vec![(DnType::CommonName, utf8("a\0\r\u{7f}"))], "CN=a\\00\\0d\\7f"),
            (vec![(DnType::CommonName, utf8("Lučić"))], "CN=Lučić"),
            (vec![(DnType::CommonName, DnValue::BmpString("a".try_into().expect("BMP")))], "CN=#1e020061"),
            (
                vec![(DnType::CommonName, utf8("a")), (mail, DnValue::Ia5String("b@c".try_into().expect("ASCII")))],
                "1.2.840.113549.1.9.1=#1603624063,CN=a",
            ),
            (vec![(DnType::CustomDnType(vec![2, 999, 3]), utf8("x"))], "2.999.3=#0c0178"),
        ] {
            assert_eq!(subject(&attributes), expected);
        }
    }

    /// A value cannot be written so that it reads as another subject.
    #[test]
    fn values_cannot_imitate_other_attributes() {
        let one = subject(&[(DnType::CommonName, utf8("a,O=b"))]);
        let two = subject(&[(DnType::OrganizationName, utf8("b")), (DnType::CommonName, utf8("a"))]);
        assert_eq!((one.as_str(), two.as_str()), ("CN=a\\,O=b", "CN=a,O=b"));
    }

    #[test]
    fn first_uri_then_dns_then_mail_is_the_alternative_name() {
        let uri = |text: &str| SanType::URI(text.try_into().expect("ASCII"));
        let dns = |text: &str| SanType::DnsName(text.try_into().expect("ASCII"));
        let mail = |text: &str| SanType::Rfc822Name(text.try_into().expect("ASCII"));
        let ip = SanType::IpAddress([192, 0, 2, 1].into());
        for (list, expected) in [
            (vec![], ""),
            (vec![ip.clone()], ""),
            (
                vec![mail("ann@a.test"), dns("A.test"), uri("spiffe://test/a"), uri("spiffe://test/b")],
                "URI:spiffe://test/a",
            ),
            (vec![ip, mail("ann@a.test"), dns("A.test"), dns("b.test")], "DNS:a.test"),
            (vec![mail("Ann@a.test")], "email:Ann@a.test"),
            (vec![uri("a b")], ""),
        ] {
            assert_eq!(&*certificate(|params| params.subject_alt_names = list).san, expected);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_result(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _any = names(&bytes);
            let _any = distinguished_name(&bytes);
            let _any = preferred_name(&bytes);
        }

        #[test]
        fn changed_certificates_do_not_panic(at: prop::sample::Index, byte: u8) {
            static CERTIFICATE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
                rcgen::generate_simple_self_signed(vec!["a.test".into()]).expect("a certificate").cert.der().to_vec()
            });
            let mut certificate = CERTIFICATE.clone();
            let at = at.index(certificate.len());
            certificate[at] = byte;
            let _any = names(&certificate);
            let _any = names(&certificate[..at]);
        }
    }
}
