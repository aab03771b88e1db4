//! The layout of a printed configuration: values by their paths, as a TOML document.
//!
//! Values outside arrays of tables come first, each with its whole path as a dotted key, because a
//! header would take all keys after it into its table. An array of tables below another table is
//! written on one line.

use super::super::node::{DocumentNode, DocumentValue};
use super::super::table_reader::bare_or_quoted;

/// A step of a path such as `routes[0].match.path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Key(String),
    Index(usize),
}

/// The steps of a path, in which keys that are not bare stand in quotes.
pub(super) fn segments(path: &str) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        rest = rest.strip_prefix('.').unwrap_or(rest);
        let end;
        if let Some(index) = rest.strip_prefix('[') {
            end = rest.find(']').map_or(rest.len(), |at| at + 1);
            let digits = index.split(']').next().unwrap_or_default();
            segments.push(Segment::Index(digits.parse().unwrap_or_default()));
        } else if rest.starts_with('"') {
            let mut read = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            let key = read.next().and_then(Result::ok).unwrap_or_default();
            end = read.byte_offset().max(1);
            segments.push(Segment::Key(key));
        } else {
            end = rest.find(['.', '[']).unwrap_or(rest.len());
            segments.push(Segment::Key(rest[..end].to_owned()));
        }
        rest = &rest[end..];
    }
    segments
}

/// The node of the document at a path.
pub(super) fn node_at<'n>(root: &'n DocumentNode, path: &[Segment]) -> Option<&'n DocumentNode> {
    path.iter().try_fold(root, |node, segment| match (segment, &node.value) {
        (Segment::Key(key), DocumentValue::Table(entries)) => {
            entries.iter().find(|entry| entry.key == *key).map(|entry| &entry.node)
        }
        (Segment::Index(index), DocumentValue::Array(items)) => items.get(*index),
        _ => None,
    })
}

/// Values in the order in which they were inserted.
#[derive(Debug, Default)]
pub(super) struct Tree(Vec<(Segment, Node)>);

#[derive(Debug)]
enum Node {
    /// The value as it is written, and its comment.
    Value(String, Option<String>),
    Branch(Tree),
}

impl Tree {
    pub(super) fn insert(&mut self, path: &[Segment], value: (String, Option<String>)) {
        if let Some((last, tables)) = path.split_last()
            && let Some(table) = self.table(tables)
        {
            table.0.push((last.clone(), Node::Value(value.0, value.1)));
        }
    }

    /// Makes sure that there is a table at `path`.
    pub(super) fn insert_table(&mut self, path: &[Segment]) {
        self.table(path);
    }

    /// The table at `path`, inserted where it is missing; `None` where a value is in its place.
    fn table(&mut self, path: &[Segment]) -> Option<&mut Tree> {
        let Some((first, rest)) = path.split_first() else { return Some(self) };
        let at = self.0.iter().position(|(known, _)| known == first).unwrap_or_else(|| {
            self.0.push((first.clone(), Node::Branch(Tree::default())));
            self.0.len() - 1
        });
        match &mut self.0[at].1 {
            Node::Branch(tree) => tree.table(rest),
            Node::Value(..) => None,
        }
    }

    fn is_array(&self) -> bool {
        matches!(self.0.first(), Some((Segment::Index(_), _)))
    }

    pub(super) fn to_toml(&self) -> String {
        let mut text = String::new();
        let is_headed = |node: &Node| matches!(node, Node::Branch(tree) if tree.is_array());
        for (segment, node) in self.0.iter().filter(|(_, node)| !is_headed(node)) {
            push_lines(&key(segment), node, &mut text);
        }
        for (segment, node) in &self.0 {
            let Node::Branch(tree) = node else { continue };
            for (_, item) in tree.0.iter().filter(|_| tree.is_array()) {
                text.push_str(&format!("\n[[{}]]\n", key(segment)));
                if let Node::Branch(item) = item {
                    item.0.iter().for_each(|(segment, node)| push_lines(&key(segment), node, &mut text));
                }
            }
        }
        text
    }
}

fn key(segment: &Segment) -> String {
    match segment {
        Segment::Key(key) => bare_or_quoted(key),
        Segment::Index(_) => String::new(),
    }
}

/// The lines of a value or of the values of a table, with their path within the current table.
fn push_lines(path: &str, node: &Node, text: &mut String) {
    match node {
        Node::Branch(tree) if !tree.is_array() && !tree.0.is_empty() => {
            for (segment, node) in &tree.0 {
                push_lines(&format!("{path}.{}", key(segment)), node, text);
            }
        }
        node => {
            text.push_str(&format!("{path} = {}", inline(node)));
            if let Some(comment) = comment(node) {
                text.push_str(&format!("  # {comment}"));
            }
            text.push('\n');
        }
    }
}

fn inline(node: &Node) -> String {
    let tree = match node {
        Node::Value(text, _) => return text.clone(),
        Node::Branch(tree) => tree,
    };
    let items: Vec<String> = tree
        .0
        .iter()
        .map(|(segment, node)| match segment {
            Segment::Index(_) => inline(node),
            Segment::Key(key) => format!("{} = {}", bare_or_quoted(key), inline(node)),
        })
        .collect();
    match (tree.is_array(), items.is_empty()) {
        (true, _) => format!("[{}]", items.join(", ")),
        (false, true) => "{}".to_owned(),
        (false, false) => format!("{{ {} }}", items.join(", ")),
    }
}

/// The comment of a value; of an array of tables, that of its first value.
fn comment(node: &Node) -> Option<&str> {
    match node {
        Node::Value(_, comment) => comment.as_deref(),
        Node::Branch(tree) => tree.0.iter().find_map(|(_, node)| comment(node)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_keys_and_indexes() {
        let key = |text: &str| Segment::Key(text.to_owned());
        let expected = [key("routes"), Segment::Index(12), key("pages"), key("a.b\"[0]"), key("x")];
        assert_eq!(segments("routes[12].pages.\"a.b\\\"[0]\".x"), expected);
    }

    #[test]
    fn tables_precede_arrays_of_tables() {
        let mut tree = Tree::default();
        let mut add = |path: &str, text: &str| tree.insert(&segments(path), (text.to_owned(), None));
        add("version", "1");
        add("listen[0].address", "\"a\"");
        add("listen[0].tls.certificates[0].cert", "\"c\"");
        add("listen[0].tls.certificates[0].key", "\"k\"");
        add("limits.\"a b\".rate", "\"1/s\"");
        tree.insert_table(&segments("upstreams.shop.concurrency"));
        tree.insert_table(&segments("listen[1]"));
        assert_eq!(
            tree.to_toml(),
            "version = 1\nlimits.\"a b\".rate = \"1/s\"\nupstreams.shop.concurrency = {}\n\n[[listen]]\n\
             address = \"a\"\ntls.certificates = [{ cert = \"c\", key = \"k\" }]\n\n[[listen]]\n"
        );
    }
}
