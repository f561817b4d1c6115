use std::time::{Duration, SystemTime};

use super::*;
use crate::{
    model::{Algorithm, Frontend, Service},
    testing::MemoryDataplane,
};

struct Loop {
    control: Control,
    dataplane: MemoryDataplane,
    directory: tempfile::TempDir,
}

fn service(name: &str, frontend: &str) -> Service {
    let frontend: Frontend = frontend.parse().unwrap();
    Service::new(Some(name.to_owned()), vec![frontend], vec![], Algorithm::Maglev).unwrap()
}

fn reload(services: Result<Vec<Service>, String>) -> Reload {
    Reload { file: "netlb.toml".to_owned(), time: SystemTime::now(), services, warnings: vec![] }
}

fn start(directory: &tempfile::TempDir, dataplane: &MemoryDataplane, file: Vec<Service>) -> Start {
    let (store, stored) = Store::open(directory.path()).unwrap();
    let desired = DesiredState::new(file.clone(), stored);
    Start { dataplane: Box::new(dataplane.clone()), desired, store, reload: reload(Ok(file)) }
}

impl Loop {
    fn start(file: Vec<Service>) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), MemoryDataplane::default(), file)
    }

    fn start_in(directory: tempfile::TempDir, dataplane: MemoryDataplane, file: Vec<Service>) -> Self {
        let (control, _thread) = Control::start(start(&directory, &dataplane, file)).unwrap();
        Self { control, dataplane, directory }
    }

    fn stored(&self) -> Vec<String> {
        let (_, services) = Store::open(self.directory.path()).unwrap();
        services.iter().map(|service| service.name().to_owned()).collect()
    }
}

#[tokio::test]
async fn an_acknowledged_change_is_programmed_and_on_disk() {
    let it = Loop::start(vec![service("file", "10.0.0.9:1/tcp")]);
    let done = it.control.change(Change::Create(service("web", "10.0.0.1:1/tcp"))).await.unwrap();
    assert_eq!(done.created, ["web"]);
    assert_eq!(it.dataplane.names(), ["file", "web"]);
    assert_eq!(it.stored(), ["web"], "file services are read again, not stored");
    assert!(it.control.is_ready());
}

#[tokio::test]
async fn stored_services_are_programmed_at_start_in_one_apply() {
    let it = Loop::start(vec![]);
    it.control.change(Change::Create(service("web", "10.0.0.1:1/tcp"))).await.unwrap();
    it.control.stop().await;
    let again = Loop::start_in(it.directory, MemoryDataplane::default(), vec![service("file", "10.0.0.9:1/tcp")]);
    assert_eq!(again.control.services().await.unwrap().len(), 2);
    assert_eq!(again.dataplane.lock().applies, 1);
}

#[tokio::test]
async fn a_service_that_does_not_fit_is_refused_with_the_reason_and_not_stored() {
    let it = Loop::start(vec![]);
    it.dataplane.fill_up("big");
    let services = vec![service("small", "10.0.0.1:1/tcp"), service("big", "10.0.0.2:1/tcp")];
    let error = it.control.change(Change::Apply { services, prune: false }).await.unwrap_err();
    assert_eq!(error.to_string(), "service big could not be programmed and nothing was changed");
    let reason = std::error::Error::source(&error).unwrap().to_string();
    assert!(reason.contains("map BACKENDS is full (4 entries); raise `limits.backends`"), "{reason}");
    assert!(it.dataplane.names().is_empty(), "the other service of the transaction is taken back");
    assert!(it.stored().is_empty());
    assert!(it.control.status().await.unwrap().out_of_sync.is_empty());
}

#[tokio::test]
async fn changes_that_wait_together_are_programmed_together_and_answered_each() {
    let it = Loop::start(vec![]);
    it.dataplane.fill_up("s7");
    it.dataplane.lock().slowness = Duration::from_millis(30);
    // Every tenth takes a frontend that another has.
    let changes = (0..50_u8).map(|n| {
        let port = if n % 10 == 9 { 1 } else { u16::from(n) + 1 };
        let control = it.control.clone();
        tokio::spawn(async move {
            control.change(Change::Create(service(&format!("s{n}"), &format!("10.0.0.1:{port}/tcp")))).await
        })
    });
    let mut refused = Vec::new();
    for (n, change) in changes.collect::<Vec<_>>().into_iter().enumerate() {
        if change.await.unwrap().is_err() {
            refused.push(n);
        }
    }
    assert_eq!(refused, [7, 9, 19, 29, 39, 49]);
    assert_eq!(it.stored().len(), 44);
    let mut stored = it.stored();
    stored.sort();
    assert_eq!(it.dataplane.names(), stored);
}

#[tokio::test]
async fn waiting_changes_share_one_apply() {
    let it = Loop::start(vec![]);
    it.control.status().await.unwrap();
    let before = it.dataplane.lock().applies;
    it.dataplane.lock().slowness = Duration::from_millis(100);
    let changes: Vec<_> = (1..=40_u8)
        .map(|n| {
            let control = it.control.clone();
            tokio::spawn(async move {
                control.change(Change::Create(service(&format!("s{n}"), &format!("10.0.0.{n}:1/tcp")))).await
            })
        })
        .collect();
    for change in changes {
        change.await.unwrap().unwrap();
    }
    let applies = it.dataplane.lock().applies - before;
    assert!(applies <= 4, "{applies} applies for 40 changes");
}

#[tokio::test]
async fn what_cannot_be_stored_is_taken_back() {
    let it = Loop::start(vec![]);
    it.control.change(Change::Create(service("kept", "10.0.0.1:1/tcp"))).await.unwrap();
    let away = it.directory.path().with_extension("away");
    std::fs::rename(it.directory.path(), &away).unwrap();
    let error = it.control.change(Change::Create(service("lost", "10.0.0.2:1/tcp"))).await.unwrap_err();
    assert!(matches!(error, ControlError::Store(_)), "{error}");
    assert_eq!(it.dataplane.names(), ["kept"]);
    std::fs::rename(&away, it.directory.path()).unwrap();
    it.control.change(Change::Create(service("lost", "10.0.0.2:1/tcp"))).await.unwrap();
    assert_eq!(it.stored(), ["kept", "lost"]);
}

#[tokio::test]
async fn a_file_that_cannot_be_read_keeps_the_old_services_and_shows() {
    let it = Loop::start(vec![service("file", "10.0.0.9:1/tcp")]);
    it.control.reload(reload(Err("netlb.toml:1:1: no".to_owned()))).await.unwrap();
    assert_eq!(it.dataplane.names(), ["file"]);
    let status = it.control.status().await.unwrap();
    assert!(!status.reload.ok);
    assert_eq!(status.reload.message.as_deref(), Some("netlb.toml:1:1: no"));
    it.control.reload(reload(Ok(vec![service("other", "10.0.0.9:1/tcp")]))).await.unwrap();
    assert_eq!(it.dataplane.names(), ["other"]);
    assert!(it.control.status().await.unwrap().reload.ok);
}

#[tokio::test]
async fn a_file_service_that_fails_is_out_of_sync_and_tried_again() {
    let it = Loop::start(vec![]);
    it.dataplane.fill_up("file");
    it.control.reload(reload(Ok(vec![service("file", "10.0.0.9:1/tcp")]))).await.unwrap();
    let status = it.control.status().await.unwrap();
    assert_eq!(status.out_of_sync[0].service, "file");
    assert!(it.control.service("file").await.unwrap().problem.unwrap().contains("is full"));
    it.control.change(Change::Create(service("web", "10.0.0.1:1/tcp"))).await.unwrap();
    it.dataplane.lock().fails.clear();
    it.control.tick(Instant::now() + Duration::from_secs(31));
    assert!(it.control.status().await.unwrap().out_of_sync.is_empty());
    assert_eq!(it.dataplane.names(), ["file", "web"]);
}

#[tokio::test]
async fn what_fails_as_the_node_changes_stays_out_of_sync_until_it_is_served() {
    let it = Loop::start(vec![service("file", "10.0.0.9:1/tcp")]);
    it.control.status().await.unwrap();
    it.dataplane.fill_up("file");
    it.dataplane.lock().moved.push("file".to_owned());
    let now = Instant::now();
    for second in 0..3 {
        it.control.tick(now + Duration::from_secs(second));
        assert_eq!(it.control.status().await.unwrap().out_of_sync[0].service, "file");
    }
    it.dataplane.lock().fails.clear();
    it.control.tick(now + Duration::from_secs(31));
    assert!(it.control.status().await.unwrap().out_of_sync.is_empty());
}

#[test]
fn retries_and_uptime_go_by_a_clock_that_nobody_sets() {
    let (directory, dataplane) = (tempfile::tempdir().unwrap(), MemoryDataplane::default());
    dataplane.fill_up("file");
    let before = Instant::now();
    let mut worker = Worker::new(start(&directory, &dataplane, vec![service("file", "10.0.0.9:1/tcp")]));
    worker.program();
    let after = Instant::now();
    for (now, applies) in [(before, 1), (before + Duration::from_secs(29), 1), (after + Duration::from_secs(30), 2)] {
        worker.tick(now);
        assert_eq!(dataplane.lock().applies, applies);
    }
    assert!(worker.status(after + Duration::from_secs(90)).uptime_seconds >= 90);
    assert_eq!(worker.status(before).uptime_seconds, 0);
}

#[tokio::test]
async fn flows_are_listed_counted_and_flushed_by_any_name_of_the_service() {
    let it = Loop::start(vec![service("a", "10.0.0.1:1/tcp"), service("b", "10.0.0.2:1/tcp")]);
    it.control.status().await.unwrap();
    it.dataplane.add_flow("a", "192.0.2.1:5000", "10.244.0.1:80");
    it.dataplane.add_flow("b", "192.0.2.1:5001", "10.244.0.1:80");
    let a = Some("10.0.0.1:1/tcp".to_owned());
    assert_eq!(it.control.count_flows(None).await.unwrap(), 2);
    assert_eq!(it.control.flows(a.clone(), 10).await.unwrap()[0].service.as_deref(), Some("a"));
    assert_eq!(it.control.flows(None, 1).await.unwrap().len(), 1);
    assert_eq!(it.control.flush_flows(a).await.unwrap(), 1);
    assert_eq!(it.control.count_flows(None).await.unwrap(), 1);
    assert!(matches!(
        it.control.count_flows(Some("c".to_owned())).await,
        Err(ControlError::Change(ChangeError::NotFound { .. }))
    ));
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let it = Loop::start(vec![]);
    let done = it.control.dry_run(Change::Create(service("web", "10.0.0.1:1/tcp"))).await.unwrap();
    assert_eq!(done.created, ["web"]);
    assert!(it.control.services().await.unwrap().is_empty());
    assert!(it.stored().is_empty());
}

#[tokio::test]
async fn a_stopped_loop_says_so() {
    let it = Loop::start(vec![]);
    it.control.stop().await;
    assert!(matches!(it.control.status().await, Err(ControlError::Stopping)));
}
