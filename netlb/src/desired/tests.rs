use proptest::prelude::*;

use super::*;
use crate::{
    model::{Algorithm, Backend, Definition, SnatMode, Weight},
    spec::ServiceSpec,
};

fn service(name: &str, frontends: &[&str]) -> Service {
    let frontends = frontends.iter().map(|text| text.parse().unwrap()).collect();
    let backend = Backend::new("10.244.0.1:80".parse().unwrap());
    let name = (!name.is_empty()).then(|| name.to_owned());
    Service::new(name, frontends, vec![backend], Algorithm::Maglev).unwrap()
}

fn state(file: &[Service], api: &[Service]) -> DesiredState {
    DesiredState::new(file.to_vec(), api.to_vec())
}

/// Carries a change out.
fn change(state: &mut DesiredState, change: Change) -> Result<Done, ChangeError> {
    let (edits, done) = state.plan(&change)?;
    for edit in edits {
        state.edit(edit);
    }
    Ok(done)
}

fn served(state: &DesiredState) -> Vec<String> {
    let show = |Desired { service, owner }: &Desired| {
        let frontends: Vec<_> = service.frontends().iter().map(Frontend::to_string).collect();
        format!("{owner} {} {}", service.name(), frontends.join(" "))
    };
    state.served().map(|desired| show(&desired)).collect()
}

fn conflicts(state: &DesiredState) -> Vec<Conflict> {
    state.conflicts().cloned().collect()
}

const A: &str = "10.96.0.1:80/tcp";
const B: &str = "10.96.0.2:80/tcp";

#[test]
fn a_service_is_found_by_its_name_and_by_every_frontend() {
    let state = state(&[service("file", &[B])], &[service("web", &[A, "10.96.0.1:443/tcp"])]);
    for reference in ["web", A, "10.96.0.1:443/TCP"] {
        assert_eq!(state.find(reference).map(|(service, owner)| (service.name(), owner)), Some(("web", Owner::Api)));
    }
    assert_eq!(state.find(B).map(|(_, owner)| owner), Some(Owner::File));
    assert_eq!(state.find("10.96.0.1:80/udp"), None);
}

#[test]
fn a_frontend_of_two_sources_stays_with_the_first_until_it_lets_go() {
    let mut state = state(&[], &[service("api", &[A])]);
    state.set_file(vec![service("file", &[A, B])]);
    assert_eq!(served(&state), ["api api 10.96.0.1:80/tcp", "file file 10.96.0.2:80/tcp"]);
    assert_eq!(
        conflicts(&state),
        [Conflict {
            service: "file".into(),
            owner: Owner::File,
            claim: Claim::Frontend(A.parse().unwrap()),
            held_by: "api".into(),
            held_by_owner: Owner::Api
        }]
    );
    change(&mut state, Change::Remove { reference: "api".into() }).unwrap();
    assert_eq!(served(&state), ["file file 10.96.0.1:80/tcp 10.96.0.2:80/tcp"]);
    assert!(conflicts(&state).is_empty());
    let again = change(&mut state, Change::Create(service("api", &[A])));
    assert!(matches!(again, Err(ChangeError::FrontendTaken { owner: Owner::File, .. })), "{again:?}");
}

#[test]
fn a_name_of_two_sources_stays_with_the_first() {
    let mut state = state(&[], &[service("web", &[A])]);
    state.set_file(vec![service("web", &[B])]);
    assert_eq!(served(&state), ["api web 10.96.0.1:80/tcp"]);
    assert_eq!(conflicts(&state)[0].claim, Claim::Name);
}

#[test]
fn an_unnamed_file_service_that_lost_its_first_frontend_is_served_at_the_next() {
    let mut state = state(&[], &[service("api", &[A])]);
    state.set_file(vec![service("", &[A, B]), service("gone", &[A])]);
    assert_eq!(served(&state), ["api api 10.96.0.1:80/tcp", "file 10.96.0.2:80/tcp 10.96.0.2:80/tcp"]);
    assert_eq!(conflicts(&state).len(), 2);
}

#[test]
fn the_api_is_refused_what_the_file_holds() {
    let mut state = state(&[service("web", &[A])], &[]);
    let refused = [
        Change::Create(service("web", &[B])),
        Change::Create(service("other", &[A])),
        Change::Put { reference: "web".into(), spec: ServiceSpec::from(&service("web", &[A])) },
        Change::Patch { reference: A.into(), patch: ServicePatch::default() },
        Change::Remove { reference: "web".into() },
        Change::RemoveBackend { reference: "web".into(), address: "10.244.0.1:80".parse().unwrap() },
        Change::Apply { services: vec![service("new", &[B]), service("web", &[A])], prune: false },
    ];
    for wanted in refused {
        let result = change(&mut state, wanted.clone());
        let Err(
            error @ (ChangeError::Owned { owner: Owner::File, .. }
            | ChangeError::NameTaken { owner: Owner::File, .. }
            | ChangeError::FrontendTaken { owner: Owner::File, .. }),
        ) = result
        else {
            panic!("{wanted:?}: {result:?}")
        };
        assert!(error.hint().unwrap().contains("configuration file"));
    }
    assert_eq!(served(&state), ["file web 10.96.0.1:80/tcp"]);
}

#[test]
fn an_unknown_service_is_answered_with_the_nearest() {
    let state = state(&[], &[service("default/web", &[A])]);
    let error = state.plan(&Change::Remove { reference: "default/wbe".into() }).unwrap_err();
    assert_eq!(error.to_string(), "service default/wbe not found");
    assert_eq!(error.hint().unwrap(), "nearest is default/web; `netlb svc list` shows all");
}

#[test]
fn put_creates_replaces_and_renames() {
    let mut state = DesiredState::default();
    let spec = |json: &str| serde_json::from_str::<ServiceSpec>(json).unwrap();
    let put = |reference: &str, json: &str| Change::Put { reference: reference.into(), spec: spec(json) };
    assert_eq!(change(&mut state, put("web", r#"{"frontend":"10.96.0.1:80/tcp"}"#)).unwrap().created, ["web"]);
    assert_eq!(change(&mut state, put("web", r#"{"frontend":"10.96.0.1:80/tcp"}"#)).unwrap().unchanged, ["web"]);
    assert_eq!(change(&mut state, put(A, r#"{"frontend":"10.96.0.2:80/tcp"}"#)).unwrap().updated, ["web"]);
    let renamed = change(&mut state, put("web", r#"{"name":"shop","frontend":"10.96.0.2:80/tcp"}"#)).unwrap();
    assert_eq!((renamed.created, renamed.removed), (vec!["shop".to_owned()], vec!["web".to_owned()]));
    assert_eq!(served(&state), ["api shop 10.96.0.2:80/tcp"]);
    let wrong = change(&mut state, put("x", r#"{"name":"y","frontend":"10.96.0.3:80/tcp"}"#));
    assert_eq!(wrong, Err(ChangeError::Mismatch { reference: "x".into() }));
}

#[test]
fn an_unnamed_service_follows_its_first_frontend() {
    let mut state = state(&[], &[service("", &[A])]);
    let patch = ServicePatch { frontends: Some(vec![B.parse().unwrap()]), ..Default::default() };
    change(&mut state, Change::Patch { reference: A.into(), patch }).unwrap();
    assert_eq!(served(&state), ["api 10.96.0.2:80/tcp 10.96.0.2:80/tcp"]);
    let spec = serde_json::from_str(r#"{"frontends":["10.96.0.1:80/tcp"]}"#).unwrap();
    change(&mut state, Change::Put { reference: B.into(), spec }).unwrap();
    assert_eq!(served(&state), ["api 10.96.0.1:80/tcp 10.96.0.1:80/tcp"]);
}

#[test]
fn backends_are_added_changed_and_removed_one_by_one() {
    let mut state = state(&[], &[service("web", &[A])]);
    let address = "10.244.0.2:80".parse().unwrap();
    let backend = Backend { weight: Weight::new(2).unwrap(), ..Backend::new(address) };
    let add = Change::AddBackend { reference: "web".into(), backend };
    change(&mut state, add.clone()).unwrap();
    assert!(matches!(change(&mut state, add), Err(ChangeError::BackendTaken { .. })));
    let patch = BackendPatch { weight: Weight::new(9).ok(), ..Default::default() };
    change(&mut state, Change::PatchBackend { reference: A.into(), address, patch }).unwrap();
    assert_eq!(state.find("web").unwrap().0.backends()[1].weight.get(), 9);
    let remove = Change::RemoveBackend { reference: "web".into(), address };
    change(&mut state, remove.clone()).unwrap();
    let error = change(&mut state, remove).unwrap_err();
    assert_eq!(error.hint().unwrap(), "nearest is 10.244.0.1:80; `netlb backend list web` shows all");
}

#[test]
fn a_change_of_one_part_leaves_the_others() {
    let mut state = state(&[], &[service("web", &[A]).with_snat(SnatMode::Always)]);
    let address = "10.244.0.2:80".parse().unwrap();
    let backend = Backend::new(address);
    let parts = |state: &DesiredState| {
        let (service, _) = state.find("web").unwrap();
        (service.algorithm(), service.snat(), service.backends().len())
    };
    let patch = |patch| Change::Patch { reference: "web".into(), patch };
    change(&mut state, Change::AddBackend { reference: "web".into(), backend }).unwrap();
    assert_eq!(parts(&state), (Algorithm::Maglev, SnatMode::Always, 2));
    let random = ServicePatch { algorithm: Some(Algorithm::Random), ..Default::default() };
    change(&mut state, patch(random)).unwrap();
    assert_eq!(parts(&state), (Algorithm::Random, SnatMode::Always, 2));
    let never = patch(ServicePatch { snat: Some(SnatMode::Never), ..Default::default() });
    assert_eq!(change(&mut state, never.clone()).unwrap().updated, ["web"]);
    assert_eq!(parts(&state), (Algorithm::Random, SnatMode::Never, 2));
    assert_eq!(change(&mut state, never).unwrap().unchanged, ["web"]);
}

#[test]
fn a_file_service_that_lost_a_frontend_is_otherwise_what_it_was() {
    let mut state = state(&[], &[service("api", &[A])]);
    state.set_file(vec![service("file", &[A, B]).with_snat(SnatMode::Never)]);
    assert_eq!(*state.find_served(B).unwrap().service, service("file", &[B]).with_snat(SnatMode::Never));
}

#[test]
fn a_transaction_may_move_a_frontend_and_prune_what_it_does_not_name() {
    let mut state = state(&[], &[service("a", &[A]), service("b", &[B]), service("old", &["10.96.0.9:80/tcp"])]);
    let services = vec![service("a", &[B]), service("b", &[A]), service("new", &["10.96.0.9:80/tcp"])];
    let without_prune = state.plan(&Change::Apply { services: services.clone(), prune: false });
    assert!(matches!(without_prune, Err(ChangeError::FrontendTaken { .. })), "{without_prune:?}");
    let done = change(&mut state, Change::Apply { services, prune: true }).unwrap();
    assert_eq!(done.removed, ["old"]);
    assert_eq!(done.updated, ["a", "b"]);
    assert_eq!(served(&state), ["api a 10.96.0.2:80/tcp", "api b 10.96.0.1:80/tcp", "api new 10.96.0.9:80/tcp"]);
    assert_eq!(state.find(A).unwrap().0.name(), "b");
    assert_eq!(state.find("10.96.0.9:80/tcp").unwrap().0.name(), "new");
}

#[test]
fn a_transaction_that_claims_a_frontend_twice_is_refused() {
    let state = state(&[], &[]);
    let change = Change::Apply { services: vec![service("a", &[A]), service("b", &[A])], prune: false };
    assert!(matches!(state.plan(&change), Err(ChangeError::FrontendTaken { .. })));
}

#[test]
fn undoing_edits_in_reverse_gives_the_state_before() {
    let before = state(&[], &[service("a", &[A]), service("b", &[B])]);
    let mut state = before.clone();
    let (edits, _) =
        state.plan(&Change::Apply { services: vec![service("b", &[A]), service("c", &[B])], prune: true }).unwrap();
    let undo: Vec<_> = edits.into_iter().map(|edit| state.edit(edit)).collect();
    assert_eq!(served(&state), ["api b 10.96.0.1:80/tcp", "api c 10.96.0.2:80/tcp"]);
    for edit in undo.into_iter().rev() {
        state.edit(edit);
    }
    assert_eq!(served(&state), served(&before));
    assert_eq!(state.find(A).unwrap().0.name(), "a");
    assert_eq!(state.find(B).unwrap().0.name(), "b");
}

/// A service with ports of the node alone, published as it says.
fn publishing(name: &str, ports: &[&str]) -> Service {
    let spec = serde_json::json!({ "name": name, "publish": ports, "backends": ["10.244.0.1"] });
    serde_json::from_value::<ServiceSpec>(spec).unwrap().into_service().unwrap()
}

const ALL: &str = "8080:80";
const ONE: &str = "192.0.2.1:8080:80";
const TWO: &str = "192.0.2.2:8080:80";

#[test]
fn a_port_on_all_addresses_and_the_same_on_one_belong_to_one_service() {
    for (first, second, held) in [
        (ALL, ONE, "port 8080/tcp on the node's IPv4 addresses"),
        (ALL, ALL, "port 8080/tcp on the node's IPv4 addresses"),
        (ONE, ALL, "frontend 192.0.2.1:8080/tcp"),
        (ONE, ONE, "frontend 192.0.2.1:8080/tcp"),
    ] {
        let (first, second) = (publishing("first", &[first]), publishing("second", &[second]));
        for (mut state, owner) in
            [(state(&[], std::slice::from_ref(&first)), "api"), (state(std::slice::from_ref(&first), &[]), "file")]
        {
            let error = change(&mut state, Change::Create(second.clone())).unwrap_err().to_string();
            assert_eq!(error, format!("{held} belongs to service first, declared by the {owner}"));
        }
        let both = Change::Apply { services: vec![first, second], prune: false };
        assert!(matches!(state(&[], &[]).plan(&both), Err(ChangeError::FrontendTaken { .. })));
    }
    let mut apart = state(&[], &[publishing("first", &[ONE])]);
    change(&mut apart, Change::Create(publishing("second", &[TWO]))).unwrap();
    assert_eq!(apart.find("192.0.2.2:8080/tcp").unwrap().0.name(), "second");
    // One service may have both, and one may give way to the other in one step.
    change(&mut apart, Change::Apply { services: vec![publishing("second", &[ALL, TWO])], prune: true }).unwrap();
    assert_eq!(apart.find("0.0.0.0:8080/tcp").unwrap().0.name(), "second");
}

#[test]
fn a_port_that_the_file_wants_waits_for_the_api_to_let_go_of_it() {
    let mut state = state(&[], &[publishing("one", &[ONE]), publishing("two", &[TWO])]);
    state.set_file(vec![publishing("file", &[ALL, "8081:80"])]);
    let claims = |state: &DesiredState| -> Vec<String> {
        state.find_served("file").unwrap().service.claims().map(|claim| claim.to_string()).collect()
    };
    assert_eq!(claims(&state), ["0.0.0.0:8081/tcp"]);
    assert_eq!(conflicts(&state).iter().map(|conflict| &*conflict.held_by).collect::<Vec<_>>(), ["one", "two"]);
    change(&mut state, Change::Remove { reference: "192.0.2.1:8080/tcp".into() }).unwrap();
    assert_eq!(claims(&state), ["0.0.0.0:8081/tcp"]);
    change(&mut state, Change::Remove { reference: "two".into() }).unwrap();
    assert_eq!(claims(&state), ["0.0.0.0:8080/tcp", "0.0.0.0:8081/tcp"]);
    assert!(conflicts(&state).is_empty());
}

#[test]
fn every_part_of_a_service_is_replaced_by_itself() {
    let mut state = state(&[], &[service("web", &[A, "10.96.0.1:53/udp"])]);
    let mut patched = |json: serde_json::Value| {
        let patch = serde_json::from_value(json).unwrap();
        change(&mut state, Change::Patch { reference: "web".into(), patch })?;
        Ok::<_, ChangeError>(ServiceSpec::from(state.find("web").unwrap().0))
    };
    let json = |spec: ServiceSpec| serde_json::to_value(spec).unwrap();
    let with = serde_json::json!({
        "external_ips": ["192.0.2.9"], "lb_ips": ["203.0.113.9:80/tcp"], "node_ports": [30080], "publish": ["8080:80"],
        "source_ranges": ["10.0.0.0/8"], "affinity": "client-ip:9", "external_traffic_policy": "Local",
        "internal_traffic_policy": "local", "snat": "never", "backends": ["10.244.0.7"],
    });
    let all = json(patched(with).unwrap());
    assert_eq!(all["external_ips"], serde_json::json!(["192.0.2.9:80/tcp", "192.0.2.9:53/udp"]));
    assert_eq!(all["node_ports"], serde_json::json!(["30080/tcp", "30080/udp"]));
    assert_eq!(all["backends"][0]["address"], "10.244.0.7:80");
    // A new frontend changes nothing else, also where its port was taken from an old one.
    let mut expected = all.clone();
    expected["frontends"] = serde_json::json!([B]);
    assert_eq!(json(patched(serde_json::json!({ "frontends": [B] })).unwrap()), expected);
    let error = patched(serde_json::json!({ "load_balancer_ips": [] })).unwrap_err().to_string();
    assert!(error.contains("has source ranges and no load-balancer address"), "{error}");
    let without = serde_json::json!({
        "external_ips": [], "load_balancer_ips": [], "source_ranges": [], "node_ports": [], "publish": [], "affinity": "none",
        "external_traffic_policy": "cluster", "internal_traffic_policy": "cluster", "snat": "auto",
    });
    let keys: Vec<_> = json(patched(without).unwrap()).as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["algorithm", "backends", "frontends", "name", "snat"]);
    let error = patched(serde_json::json!({ "frontends": [], "external_ips": ["192.0.2.9"] })).unwrap_err().to_string();
    assert!(error.contains("has no frontend whose port address 192.0.2.9 could have"), "{error}");
}

#[test]
fn every_part_of_a_backend_is_replaced_by_itself() {
    let mut backend = Backend::new("10.244.0.1:80".parse().unwrap());
    let mut patched = |json: &str| {
        serde_json::from_str::<BackendPatch>(json).unwrap().apply(&mut backend);
        serde_json::to_string(&crate::spec::BackendSpec::from(backend.clone())).unwrap()
    };
    let start = r#"{"address":"10.244.0.1:80","weight":1,"state":"active""#;
    for (json, expected) in [
        ("{}", "}"),
        (r#"{"node":"n","hints":{"zones":["z"]}}"#, r#","node":"n","hints":{"zones":["z"]}}"#),
        (r#"{"zone":"z","hints":{"nodes":["n"]}}"#, r#","node":"n","zone":"z","hints":{"nodes":["n"],"zones":["z"]}}"#),
        (r#"{"node":null,"hints":{"nodes":[],"zones":[]}}"#, r#","zone":"z"}"#),
        // It serves as it is ready, until it is said to be otherwise.
        (r#"{"zone":null,"ready":false}"#, r#","ready":false}"#),
        (r#"{"serving":true,"terminating":true}"#, r#","ready":false,"serving":true,"terminating":true}"#),
        (r#"{"terminating":false}"#, r#","ready":false,"serving":true}"#),
        (r#"{"ready":true}"#, "}"),
    ] {
        assert_eq!(patched(json), format!("{start}{expected}"), "{json}");
    }
    assert_eq!(backend.placement, None);
}

#[test]
fn a_nameless_service_of_ports_does_not_change_its_family_in_silence() {
    let spec: ServiceSpec = serde_json::from_str(r#"{"node_port":30080}"#).unwrap();
    let mut state = state(&[], &[spec.into_service().unwrap()]);
    let add = |address: &str| Change::AddBackend {
        reference: "0.0.0.0:30080/tcp".into(),
        backend: Backend::new(address.parse().unwrap()),
    };
    let error = change(&mut state, add("[fd00::1]:80")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "service 0.0.0.0:30080/tcp has no name of its own, and would be [::]:30080/tcp with this backend"
    );
    assert_eq!(error.hint().unwrap(), "name it first: `netlb svc set 0.0.0.0:30080/tcp --name NAME`");
    change(&mut state, add("10.0.0.1:80")).unwrap();
    assert_eq!(state.find("0.0.0.0:30080/tcp").unwrap().0.backends().len(), 1);
}

#[test]
fn a_service_of_ports_keeps_its_family_without_backends() {
    let service = |json: &str| serde_json::from_str::<ServiceSpec>(json).unwrap().into_service().unwrap();
    let mut state = state(
        &[],
        &[
            service(r#"{"name":"web4","node_port":30080,"backends":["10.0.0.1:80"]}"#),
            service(r#"{"name":"web6","node_port":30080,"publish":["8080:80"],"backends":["[fd00::1]:80"]}"#),
        ],
    );
    let reference = || "web6".to_owned();
    let address = "[fd00::1]:80".parse().unwrap();
    change(&mut state, Change::RemoveBackend { reference: reference(), address }).unwrap();
    let web6 = |state: &DesiredState| state.find("web6").unwrap().0.clone();
    let claims: Vec<_> = web6(&state).claims().map(|claim| claim.to_string()).collect();
    assert_eq!(claims, ["[::]:30080/tcp", "[::]:8080/tcp"]);
    let add =
        |address: &str| Change::AddBackend { reference: reference(), backend: Backend::new(address.parse().unwrap()) };
    assert_eq!(
        change(&mut state, add("10.0.0.2:80")).unwrap_err().to_string(),
        "service `web6` has family ipv6, and 10.0.0.2:80 is of the other one; make one service per family"
    );
    change(&mut state, add("[fd00::2]:80")).unwrap();
    // Who replaces all of them may mean another family.
    let patch = serde_json::from_str(r#"{"node_ports":[30081],"backends":["10.0.0.2:80"]}"#).unwrap();
    change(&mut state, Change::Patch { reference: reference(), patch }).unwrap();
    assert!(!web6(&state).is_v6());
    let patch = serde_json::from_str(r#"{"frontends":["[fd00::a]:80/tcp"],"backends":[]}"#).unwrap();
    change(&mut state, Change::Patch { reference: reference(), patch }).unwrap();
    assert_eq!((web6(&state).is_v6(), web6(&state).family()), (true, None));
    // What is left of it without its address.
    let left = web6(&state).without(|claim| claim.address.port() == 80).unwrap();
    assert!(left.is_v6() && left.family().is_some());
}

/// One of a few services: `frontends` is a bit for each of four, `ports` for each of three published ports, `unnamed` leaves the name to
/// the first of them.
fn any_service() -> impl Strategy<Value = Service> {
    (0..4_u8, 0..16_u8, 0..8_u8, any::<bool>()).prop_map(|(number, frontends, ports, unnamed)| {
        // Something has to be there.
        let frontends = if ports == 0 { frontends.max(1) } else { frontends };
        let frontends = (0..4).filter(|bit| frontends >> bit & 1 != 0).map(|bit| format!("10.96.0.{bit}:80/tcp"));
        let publish = (0..3).filter(|bit| ports >> bit & 1 != 0).map(|bit| [ALL, ONE, TWO][bit].parse().unwrap());
        let definition = Definition {
            name: (!unnamed).then(|| format!("s{number}")),
            frontends: frontends.map(|text| text.parse().unwrap()).collect(),
            publish: publish.collect(),
            backends: vec![Backend::new("10.244.0.1:80".parse().unwrap())],
            ..Definition::default()
        };
        Service::define(definition).unwrap()
    })
}

/// A file has no name and no frontend twice.
fn any_file() -> impl Strategy<Value = Vec<Service>> {
    prop::collection::vec(any_service(), 0..4).prop_map(|services| {
        let (mut names, mut claims) = (HashSet::new(), Claims::default());
        let is_new = |service: &Service| {
            let is_new = names.insert(service.name().to_owned()) && claims.rivals(service).next().is_none();
            if is_new {
                claims.insert(service, &());
            }
            is_new
        };
        let mut services = services;
        services.retain(is_new);
        services
    })
}

#[derive(Clone, Debug)]
enum Step {
    File(Vec<Service>),
    Change(Change),
    /// A change that is taken back.
    Undone(Change),
}

fn any_step() -> impl Strategy<Value = Step> {
    let change = prop_oneof![
        any_service().prop_map(Change::Create),
        (0..4_u8).prop_map(|number| Change::Remove { reference: format!("s{number}") }),
        (0..4_u8).prop_map(|bit| Change::Remove { reference: format!("10.96.0.{bit}:80/tcp") }),
        (0..3_u8).prop_map(|bit| Change::Remove { reference: format!("192.0.2.{bit}:8080/tcp") }),
        (any_file(), any::<bool>()).prop_map(|(services, prune)| Change::Apply { services, prune }),
    ];
    let changed = change.clone().prop_map(Step::Change);
    prop_oneof![2 => any_file().prop_map(Step::File), 6 => changed, 2 => change.prop_map(Step::Undone)]
}

proptest! {
    #[test]
    fn what_is_served_follows_the_edits_as_if_made_anew(steps in prop::collection::vec(any_step(), 1..40)) {
        let by_name = |state: &DesiredState| -> BTreeMap<String, Desired> {
            state.served().map(|desired| (desired.service.name().to_owned(), desired)).collect()
        };
        let mut state = DesiredState::default();
        let mut file = Vec::new();
        // What a data plane has that is told the touched names only.
        let mut told = BTreeMap::new();
        for step in steps {
            match step {
                Step::File(services) => {
                    file = services;
                    state.set_file(file.clone());
                    state.take_touched();
                    told = by_name(&state);
                }
                Step::Change(wanted) => {
                    change(&mut state, wanted).ok();
                }
                Step::Undone(wanted) => {
                    let edits = state.plan(&wanted).map(|(edits, _)| edits).unwrap_or_default();
                    let undo: Vec<_> = edits.into_iter().map(|edit| state.edit(edit)).collect();
                    for edit in undo.into_iter().rev() {
                        state.edit(edit);
                    }
                }
            }
            for Touched { name, wanted } in state.take_touched() {
                match wanted {
                    Some(desired) => told.insert(name, desired),
                    None => told.remove(&name),
                };
            }
            let anew = DesiredState::new(file.clone(), state.api_services().cloned().collect());
            prop_assert_eq!(&told, &by_name(&anew));
            prop_assert_eq!(by_name(&state), by_name(&anew));
            prop_assert_eq!(conflicts(&state), conflicts(&anew));
            for desired in anew.served() {
                let found = |reference: &str| state.find_served(reference);
                prop_assert_eq!(found(desired.service.name()), Some(desired.clone()));
                for claim in desired.service.claims() {
                    prop_assert_eq!(found(&claim.to_string()), Some(desired.clone()));
                }
            }
        }
    }
}
