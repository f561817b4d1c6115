use super::*;
use crate::model::{Algorithm, SnatMode};

fn service(name: &str, frontend: &str) -> Service {
    Service::new(Some(name.to_owned()), vec![frontend.parse().unwrap()], vec![], Algorithm::Random).unwrap()
}

#[test]
fn what_was_saved_is_read_and_a_missing_file_is_empty() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, services) = Store::open(&directory.path().join("deep/er")).unwrap();
    assert!(services.is_empty());
    let saved = [service("a", "10.0.0.1:1/tcp"), service("b", "[fd00::1]:1/udp")];
    store.save(saved.iter()).unwrap();
    assert_eq!(Store::open(&store.directory).unwrap().1, saved);
}

#[test]
fn how_clients_get_an_address_of_the_node_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(directory.path()).unwrap();
    let mut all = vec![service("a", "10.0.0.1:1/tcp").with_snat(SnatMode::Never)];
    store.save(all.iter()).unwrap();
    all.push(service("b", "10.0.0.2:1/tcp").with_snat(SnatMode::Always));
    append(&mut store, "b", &all).unwrap();
    assert_eq!(reopen(&store).1, all);
}

#[test]
fn everything_a_service_is_reached_by_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(directory.path()).unwrap();
    let spec = |json: &str| serde_json::from_str::<ServiceSpec>(json).unwrap().into_service().unwrap();
    let first = spec(
        r#"{"name":"a","frontend":"10.0.0.1:1/tcp","external_ips":["192.0.2.1"],"lb_ips":["203.0.113.1"],"source_ranges":["10.0.0.0/8"],
            "affinity":"client-ip","external_traffic_policy":"local","internal_traffic_policy":"local",
            "backends":[{"address":"10.0.1.1:80","node":"n","zone":"z","ready":false,"terminating":true,"hints":{"nodes":["n"]}}]}"#,
    );
    let mut all =
        vec![spec(r#"{"node_ports":[30080],"publish":["192.0.2.1:8080:80"],"backends":["10.0.1.1"]}"#), first];
    store.save(all.iter()).unwrap();
    all.push(spec(r#"{"name":"b","publish":["8081:80/udp"],"family":"ipv6"}"#));
    append(&mut store, "b", &all).unwrap();
    assert_eq!(reopen(&store).1, all);
}

#[test]
fn services_kept_before_there_was_a_choice_of_snat_have_the_default() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(directory.path()).unwrap();
    let snapshot = r#"{"version":1,"journal":1,"services":[{"name":"a","frontends":["10.0.0.1:1/tcp"],"backends":[],"algorithm":"random"}]}"#;
    let journal =
        r#"898f98aa [{"put":{"name":"b","frontends":["10.0.0.2:1/tcp"],"backends":[],"algorithm":"random"}}]"#;
    fs::write(store.path(), snapshot).unwrap();
    fs::write(directory.path().join(journal_name(1)), format!("{journal}\n")).unwrap();
    let expected = [service("a", "10.0.0.1:1/tcp"), service("b", "10.0.0.2:1/tcp")];
    assert_eq!(reopen(&store).1, expected);
}

#[test]
fn a_file_cut_anywhere_is_refused_by_name_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(directory.path()).unwrap();
    store.save([service("a", "10.0.0.1:1/tcp")].iter()).unwrap();
    let whole = fs::read(store.path()).unwrap();
    // The last byte is the newline after the document.
    for cut in 0..whole.len() - 1 {
        fs::write(store.path(), &whole[..cut]).unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(error.to_string().contains("services.json is damaged: "), "{error}");
        assert!(error.hint().unwrap().contains("services.json.damaged"));
        assert_eq!(fs::read(store.path()).unwrap(), whole[..cut]);
    }
}

#[test]
fn a_newer_version_and_double_claims_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(directory.path()).unwrap();
    for (text, problem) in [
        (r#"{"version":2,"services":[],"more":1}"#, "has version 2, this netlb knows version 1"),
        (
            r#"{"version":1,"services":[{"frontend":"10.0.0.1:1/tcp"},{"name":"b","frontend":"10.0.0.1:1/tcp"}]}"#,
            "frontend 10.0.0.1:1/tcp is in it twice",
        ),
        (
            r#"{"version":1,"services":[{"name":"a","publish":["192.0.2.1:80:80"]},{"name":"b","node_port":80}]}"#,
            "port 80/tcp on the node's IPv4 addresses is in it twice",
        ),
        (r#"{"version":1,"services":[{"name":"b"}]}"#, "service `b` has no frontend"),
    ] {
        fs::write(store.path(), text).unwrap();
        let error = Store::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}

#[test]
fn a_temporary_file_of_a_killed_daemon_is_no_state_and_goes() {
    let directory = tempfile::tempdir().unwrap();
    let leftover = directory.path().join(".services-abc");
    fs::write(&leftover, r#"{"version":1,"serv"#).unwrap();
    assert!(Store::open(directory.path()).unwrap().1.is_empty());
    assert!(!leftover.exists());
}

/// Keeps what an edit made of one service.
fn append(store: &mut Store, name: &str, all: &[Service]) -> Result<(), StoreError> {
    let edited = all.iter().find(|service| service.name() == name);
    store.append([(name, edited)].into_iter(), all.iter())
}

fn reopen(store: &Store) -> (Store, Vec<Service>) {
    Store::open(&store.directory).unwrap()
}

/// A store with a snapshot and some changes after it, what was kept after each of those, and where its record ends.
fn with_changes(directory: &Path) -> (Store, Vec<(usize, Vec<Service>)>) {
    let (mut store, _) = Store::open(directory).unwrap();
    let [a, b, c] = [1, 2, 3].map(|n| service(&format!("s{n}"), &format!("10.0.0.{n}:1/tcp")));
    let moved = service("s2", "10.0.0.1:1/tcp");
    append(&mut store, "s1", std::slice::from_ref(&a)).unwrap();
    let mut kept = vec![(0, vec![a.clone()])];
    let steps = [
        (vec!["s2"], vec![a.clone(), b]),
        (vec!["s3"], vec![a, service("s2", "10.0.0.2:1/tcp"), c.clone()]),
        // One change, of two names.
        (vec!["s1", "s2"], vec![moved, c]),
    ];
    for (names, all) in steps {
        let edits = names.iter().map(|name| (*name, all.iter().find(|service| service.name() == *name)));
        store.append(edits, all.iter()).unwrap();
        kept.push((store.length.unwrap() as usize, all));
    }
    (store, kept)
}

#[test]
fn changes_are_in_the_journal_and_are_read_with_the_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let (store, kept) = with_changes(directory.path());
    assert_eq!(Store::files(directory.path()).len(), 2);
    let (again, services) = reopen(&store);
    assert_eq!(services, kept.last().unwrap().1);
    assert_eq!(again.length, store.length, "and it goes on from there");
}

#[test]
fn a_journal_cut_anywhere_is_read_up_to_the_last_whole_change() {
    let directory = tempfile::tempdir().unwrap();
    let (store, kept) = with_changes(directory.path());
    let path = directory.path().join(journal_name(store.journal));
    let whole = fs::read(&path).unwrap();
    assert_eq!(kept.last().unwrap().0, whole.len());
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let (mut store, services) = reopen(&store);
        let (_, expected) = kept.iter().rfind(|(end, _)| *end <= cut).unwrap();
        assert_eq!(services, *expected, "{cut} bytes");
        assert_eq!(fs::read(&path).unwrap(), whole[..cut], "left as it is");
        // Whatever is at its end, the next change is kept.
        let before = fs::read(store.path()).unwrap();
        let mut all = services;
        all.push(service("s9", "10.0.0.9:1/tcp"));
        append(&mut store, "s9", &all).unwrap();
        let (again, services) = reopen(&store);
        assert_eq!(services, all);
        fs::remove_file(directory.path().join(journal_name(again.journal))).ok();
        fs::write(store.path(), before).unwrap();
    }
}

#[test]
fn a_damaged_journal_is_refused_by_name_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = with_changes(directory.path());
    let path = directory.path().join(journal_name(store.journal));
    let mut text = fs::read(&path).unwrap();
    text[20] ^= 1;
    fs::write(&path, &text).unwrap();
    let error = Store::open(directory.path()).unwrap_err();
    assert!(error.to_string().contains("services-1.journal is damaged: the change at byte 0"), "{error}");
    assert!(error.hint().unwrap().contains("services-1.journal.damaged"));
    assert_eq!(fs::read(&path).unwrap(), text);
}

#[test]
fn a_journal_that_grew_is_taken_into_a_new_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(directory.path()).unwrap();
    let all: Vec<_> = (0..5).map(|n| service(&format!("s{n}"), &format!("10.0.0.{}:1/tcp", n + 1))).collect();
    store.save(all.iter()).unwrap();
    let first = store.journal;
    let mut most = 0;
    while store.journal == first {
        append(&mut store, "s3", &all).unwrap();
        most = most.max(store.length.unwrap());
    }
    assert!((LEAST_JOURNAL - 200..=LEAST_JOURNAL).contains(&most), "{most}");
    assert!(journals(directory.path()).is_empty(), "the old one is gone, and the new one not begun");
    append(&mut store, "s4", &all[..4]).unwrap();
    assert_eq!(reopen(&store).1, all[..4]);
}

#[test]
fn a_journal_that_its_snapshot_has_taken_in_is_not_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = with_changes(directory.path());
    let path = directory.path().join(journal_name(store.journal));
    let journal = fs::read(&path).unwrap();
    let only = [service("only", "10.0.0.7:1/tcp")];
    store.save(only.iter()).unwrap();
    // The daemon was killed before it could remove it.
    fs::write(&path, journal).unwrap();
    let (mut store, services) = reopen(&store);
    assert_eq!(services, only);
    append(&mut store, "only", &[]).unwrap();
    assert_eq!(reopen(&store).1, []);
}

#[test]
fn a_journal_that_somebody_else_wrote_to_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, kept) = with_changes(directory.path());
    for meddle in [|path: &Path| fs::write(path, "mine").unwrap(), |path: &Path| fs::remove_file(path).unwrap()] {
        let (before, all) = (store.journal, &kept.last().unwrap().1);
        meddle(&directory.path().join(journal_name(before)));
        append(&mut store, "s2", all).unwrap();
        assert!(store.journal > before);
        append(&mut store, "s2", all).unwrap();
        assert_eq!(reopen(&store).1, *all);
    }
}

#[test]
fn a_snapshot_put_aside_keeps_its_journal() {
    let directory = tempfile::tempdir().unwrap();
    let (store, kept) = with_changes(directory.path());
    let aside = directory.path().join("services.json.damaged");
    fs::rename(store.path(), &aside).unwrap();
    let (mut store, services) = reopen(&store);
    assert_eq!(services, []);
    for name in ["x", "y"] {
        append(&mut store, name, &[service(name, "10.0.0.8:1/tcp")]).unwrap();
    }
    fs::rename(&aside, store.path()).unwrap();
    assert_eq!(reopen(&store).1, kept.last().unwrap().1);
}
