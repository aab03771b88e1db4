//! The built-in page of the gateway's own responses, in English and Chinese. It needs no other
//! request, and follows the color scheme of the browser.

use http::StatusCode;

use super::page_format::PageLanguage;
use crate::error::ErrorKind;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2733;--soft:#5b6b7b;--line:#d8e0e8;--card:#fff;--back:#eef3f7;--accent:#0b6e99}\
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9fb0c0;--line:#2c3a47;--card:#17212b;--back:#0e151c;--accent:#5cc4f0}}\
*{box-sizing:border-box}\
body{margin:0;min-height:100vh;display:grid;place-items:center;padding:1.25rem;background:var(--back);color:var(--ink);\
font:1.05rem/1.6 system-ui,-apple-system,\"Segoe UI\",Roboto,\"PingFang SC\",\"Microsoft YaHei\",\"Noto Sans SC\",sans-serif}\
main{width:100%;max-width:34rem;padding:2rem 1.75rem;background:var(--card);border:1px solid var(--line);\
border-top:4px solid var(--accent);border-radius:.75rem}\
p{margin:.75rem 0 0}\
.status{margin:0;color:var(--accent);font-weight:600;letter-spacing:.06em}\
h1{margin:.25rem 0 0;font-size:1.6rem;line-height:1.25}\
.id{margin-top:1.5rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}\
code{font-family:ui-monospace,Menlo,Consolas,monospace}";

/// The facts that the page shows.
pub(super) struct PageText<'a> {
    pub(super) status: StatusCode,
    pub(super) kind: ErrorKind,
    /// Seconds.
    pub(super) retry_after: Option<u64>,
    /// Needs no escaping. Empty: none.
    pub(super) request_id: &'a str,
    pub(super) language: PageLanguage,
}

impl PageText<'_> {
    pub(super) fn html(&self) -> String {
        let PageText { status, retry_after, request_id, language, .. } = *self;
        let (tag, title, message) = (language.tag(), title(status, language), self.message());
        let retry = retry_after.map_or(String::new(), |seconds| match (language, seconds) {
            (PageLanguage::English, 1) => "<p>Try again in 1 second.</p>".to_owned(),
            (PageLanguage::English, _) => format!("<p>Try again in {seconds} seconds.</p>"),
            (PageLanguage::Chinese, _) => format!("<p>请在 {seconds} 秒后重试。</p>"),
        });
        let id_label = match language {
            PageLanguage::English => "Request id",
            PageLanguage::Chinese => "请求编号",
        };
        let id = if request_id.is_empty() {
            String::new()
        } else {
            format!("<p class=\"id\">{id_label} <code>{request_id}</code></p>")
        };
        format!(
            "<!doctype html>\n<html lang=\"{tag}\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{title}</title>\
             <style>{STYLE}</style></head>\
             <body><main><p class=\"status\">{}</p><h1>{title}</h1><p>{message}</p>{retry}{id}</main></body></html>\n",
            status.as_str()
        )
    }

    fn message(&self) -> &'static str {
        message(self.kind, self.language)
    }
}

/// A sentence for readers.
pub(super) fn message(kind: ErrorKind, language: PageLanguage) -> &'static str {
    let (english, chinese) = messages(kind);
    match language {
        PageLanguage::English => english,
        PageLanguage::Chinese => chinese,
    }
}

fn messages(kind: ErrorKind) -> (&'static str, &'static str) {
    match kind {
        ErrorKind::NoRoute => ("Nothing is available at this address.", "此地址没有可用的内容。"),
        ErrorKind::Misdirected => {
            ("This connection is for another address. Please open a new one.", "此连接用于另一个地址，请重新建立连接。")
        }
        ErrorKind::Forbidden => ("Access is denied.", "访问被拒绝。"),
        ErrorKind::Limited => ("Too many requests. Please wait a moment and try again.", "请求过于频繁，请稍候再试。"),
        ErrorKind::Unauthorized => {
            ("This page needs a name and a password, or a key.", "访问此页面需要用户名和密码，或密钥。")
        }
        ErrorKind::VerificationThrottled | ErrorKind::AuthenticationThrottled => (
            "Too many requests with invalid credentials. Please wait a moment and try again.",
            "使用无效凭据的请求过多，请稍候再试。",
        ),
        ErrorKind::OnlyIfCached => ("No stored response is available.", "没有可用的缓存响应。"),
        ErrorKind::ClientBody | ErrorKind::ClientGone => ("The request could not be read.", "无法读取该请求。"),
        ErrorKind::Panic => ("Something went wrong on our side.", "服务器内部发生错误。"),
        _ => ("The service is temporarily unavailable. Please try again shortly.", "服务暂时不可用，请稍后再试。"),
    }
}

fn title(status: StatusCode, language: PageLanguage) -> &'static str {
    let english = status.canonical_reason().unwrap_or("Error");
    match (language, status.as_u16()) {
        (PageLanguage::English, _) => english,
        (PageLanguage::Chinese, 400) => "请求无效",
        (PageLanguage::Chinese, 401) => "需要身份验证",
        (PageLanguage::Chinese, 403) => "禁止访问",
        (PageLanguage::Chinese, 404) => "未找到",
        (PageLanguage::Chinese, 408) => "请求超时",
        (PageLanguage::Chinese, 413) => "请求内容过大",
        (PageLanguage::Chinese, 429) => "请求过多",
        (PageLanguage::Chinese, 500) => "服务器错误",
        (PageLanguage::Chinese, 502) => "网关错误",
        (PageLanguage::Chinese, 503) => "服务不可用",
        (PageLanguage::Chinese, 504) => "网关超时",
        (PageLanguage::Chinese, _) => english,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Label as _;

    #[test]
    fn page_is_complete_in_both_languages_and_loads_nothing() {
        for kind in ErrorKind::ALL {
            for (language, lang) in [(PageLanguage::English, "lang=\"en\""), (PageLanguage::Chinese, "lang=\"zh\"")] {
                let text = PageText {
                    status: StatusCode::SERVICE_UNAVAILABLE,
                    kind: *kind,
                    retry_after: Some(7),
                    request_id: "id-1",
                    language,
                };
                let html = text.html();
                for part in [lang, "503", " 7 ", "<code>id-1</code>", text.message()] {
                    assert!(html.contains(part), "{part}: {html}");
                }
                assert!(!html.contains("http") && !html.contains("url(") && !html.contains("src="), "{html}");
            }
        }
    }

    #[test]
    fn absent_facts_are_left_out() {
        let text = PageText {
            status: StatusCode::NOT_FOUND,
            kind: ErrorKind::NoRoute,
            retry_after: None,
            request_id: "",
            language: PageLanguage::English,
        };
        let html = text.html();
        assert!(!html.contains("Try again") && !html.contains("Request id"), "{html}");
    }
}
