//! What this program was built from: results of measurements say which code gave them.

// Only the build script and the tests compute digests.
#[cfg(test)]
mod digest;

/// Method name and digest of its code.
const METHODS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/method_code.rs"));

/// Digest of the code of a method; none for a name that is no method.
pub fn of_method(name: &str) -> Option<&'static str> {
    METHODS.iter().find(|(method, _)| *method == name).map(|(_, digest)| *digest)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_method_has_a_digest_of_its_own() {
        let mut cards = crate::methods::registry::cards();
        cards.extend(crate::methods::adapt::registry::cards());
        let digests: std::collections::BTreeSet<_> =
            cards.iter().map(|card| of_method(card.name).expect(card.name)).collect();
        assert_eq!(digests.len(), cards.len());
        for part in ["mask", "module", "options"] {
            assert_eq!(of_method(part), None, "a part of methods is none");
        }
    }

    #[test]
    fn tunings_depend_on_the_loop_and_not_on_the_list_of_methods() {
        let folder = tempfile::tempdir().expect("a folder");
        let src = folder.path();
        let write = |file: &str, text: &str| {
            let path = src.join(file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        };
        write("methods/mod.rs", "pub mod adapt;\n");
        fs::create_dir_all(src.join("calibrate")).expect("made");
        write("train/run.rs", "fn run() {}\n");
        write("train/optimizer/adamw.rs", "fn step() { one() }\n");
        write("methods/adapt/mod.rs", "#[cfg(test)]\nmod tests;\nuse module;\n");
        write("methods/adapt/module.rs", "fn module() { registry() }\n");
        write("methods/adapt/registry.rs", "use a;\nuse b;\n");
        write("methods/adapt/a.rs", "impl Adapt for A {}\n");
        write("methods/adapt/b.rs", "impl Adapt for B {}\n");
        let digests = || {
            let all = digest::of_methods(src).expect("read");
            assert_eq!(all.len(), 2);
            (all["adapt/a"].clone(), all["adapt/b"].clone())
        };
        let (a, b) = digests();
        write("methods/adapt/b.rs", "impl Adapt for B { other }\n");
        let changed = digests();
        assert!(changed.0 == a && changed.1 != b, "the list names methods and uses none");
        write("train/run/tests.rs", "fn test() {}\n");
        assert_eq!(digests(), changed, "tests do not count");
        write("train/optimizer/adamw.rs", "fn step() { two() }\n");
        let stepped = digests();
        assert!(stepped.0 != changed.0 && stepped.1 != changed.1);
        write("methods/adapt/module.rs", "fn module() { more() }\n");
        assert_ne!(digests().0, stepped.0, "all use what the group shares");
    }

    #[test]
    fn only_code_that_a_method_uses_changes_its_digest() {
        let folder = tempfile::tempdir().expect("a folder");
        let src = folder.path();
        let write = |file: &str, text: &str| {
            let path = src.join(file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        };
        write("methods/mod.rs", "pub mod compress;\n");
        write("methods/scope.rs", "fn names() {}\n");
        write("calibrate/walk.rs", "fn walk() { one() }\n");
        write("methods/compress/mod.rs", "pub mod a;\npub mod b;\nmod mask;\nfn shared() {}\n");
        write("methods/compress/mask.rs", "fn mask() {}\n");
        write(
            "methods/compress/a.rs",
            "use super::mask;\nuse crate::calibrate;\nimpl Method for A {}\n",
        );
        write("methods/compress/b.rs", "impl Method for B { say(\"\\\"a\\\", mask\") }\n");
        let digests = |src: &Path| {
            let all = digest::of_methods(src).expect("read");
            (all["compress/a"].clone(), all["compress/b"].clone())
        };
        let (a, b) = digests(src);
        write(
            "methods/compress/mask.rs",
            "// why\n\n  fn mask() {}\n\n#[cfg(test)]\nmod tests {}\n",
        );
        assert_eq!(digests(src), (a.clone(), b.clone()), "comments and tests do not count");
        write("methods/compress/mask.rs", "fn mask() { other() }\n");
        let changed = digests(src);
        assert!(changed.0 != a && changed.1 == b, "b does not use masks");
        write("calibrate/walk.rs", "fn walk() { two() }\n");
        let walked = digests(src);
        assert!(walked.0 != changed.0 && walked.1 == b, "b does not calibrate");
        write("methods/compress/mod.rs", "pub mod a;\nmod new;\nfn shared() { more() }\n");
        let shared = digests(src);
        assert!(shared.0 != walked.0 && shared.1 != b, "all use what the group shares");
    }
}
