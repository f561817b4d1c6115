use proptest::prelude::*;

use super::*;
use crate::{
    model::{Algorithm, Backend, SnatMode, Weight},
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
    let patch = BackendPatch { weight: Weight::new(9).ok(), state: None };
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

/// One of a few services: `frontends` is a bit for each of four, `unnamed` leaves the name to the first of them.
fn any_service() -> impl Strategy<Value = Service> {
    (0..4_u8, 1..16_u8, any::<bool>()).prop_map(|(number, frontends, unnamed)| {
        let frontends = (0..4).filter(|bit| frontends >> bit & 1 != 0).map(|bit| format!("10.96.0.{bit}:80/tcp"));
        let frontends: Vec<_> = frontends.collect();
        let frontends: Vec<_> = frontends.iter().map(String::as_str).collect();
        service(&if unnamed { String::new() } else { format!("s{number}") }, &frontends)
    })
}

/// A file has no name and no frontend twice.
fn any_file() -> impl Strategy<Value = Vec<Service>> {
    prop::collection::vec(any_service(), 0..4).prop_map(|services| {
        let (mut names, mut frontends) = (HashSet::new(), HashSet::new());
        let is_new = |service: &Service| {
            names.insert(service.name().to_owned())
                && service.frontends().iter().all(|frontend| frontends.insert(*frontend))
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
                for frontend in desired.service.frontends() {
                    prop_assert_eq!(found(&frontend.to_string()), Some(desired.clone()));
                }
            }
        }
    }
}
