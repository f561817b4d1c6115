use std::time::Duration;

use super::{signals::Wanted, socket};
use crate::{
    testing::{TestDaemon, wait_until},
    view::{ServiceView, StatusView},
};

const WEB: &str = "[[service]]\nname = \"web\"\nfrontend = \"10.96.0.1:80/tcp\"\nbackends = [\"10.244.0.1:80\"]\n";

fn status(daemon: &TestDaemon) -> StatusView {
    daemon.client().get("/v1/status").unwrap()
}

#[test]
fn the_socket_opens_when_everything_is_programmed_in_one_apply() {
    let daemon = TestDaemon::start(WEB);
    assert_eq!(daemon.dataplane.names(), ["web"]);
    assert_eq!(daemon.dataplane.lock().applies, 1);
    assert_eq!(daemon.client().get::<ServiceView>("/v1/services/web").unwrap().backends.len(), 1);
}

#[test]
fn a_changed_file_is_applied_live() {
    let daemon = TestDaemon::start(WEB);
    daemon.write_config(&WEB.replace("web", "shop"));
    wait_until(|| daemon.dataplane.names() == ["shop"]);
    assert!(status(&daemon).reload.ok);
}

#[test]
fn a_half_written_file_keeps_the_services_and_shows_in_status() {
    let daemon = TestDaemon::start(WEB);
    for bad in [&WEB[..40], ""] {
        daemon.write_config(bad);
        wait_until(|| !status(&daemon).reload.ok);
        assert_eq!(daemon.dataplane.names(), ["web"]);
        let message = status(&daemon).reload.message.unwrap();
        assert!(message.contains("netlb.toml:"), "{message}");
        daemon.write_config(WEB);
        wait_until(|| status(&daemon).reload.ok);
    }
}

#[test]
fn sighup_reads_the_file_also_when_it_did_not_change() {
    let daemon = TestDaemon::start(WEB);
    let before = daemon.dataplane.lock().applies;
    daemon.signal(Wanted::Reload);
    wait_until(|| daemon.dataplane.lock().applies > before);
}

#[test]
fn a_change_that_needs_a_restart_is_named() {
    let daemon = TestDaemon::start(WEB);
    daemon.write_config(&format!("[limits]\nflows = 5000\n{WEB}"));
    wait_until(|| status(&daemon).warnings.iter().any(|warning| warning.starts_with("changes in [limits] of ")));
}

#[test]
fn the_data_plane_is_ticked_each_second() {
    let daemon = TestDaemon::start("");
    wait_until(|| daemon.dataplane.lock().ticks >= 2);
}

#[test]
fn api_services_survive_a_restart_and_the_socket_goes_with_the_daemon() {
    let daemon = TestDaemon::start(WEB);
    let spec = serde_json::json!({"name": "dns", "frontend": "10.96.0.53:53/udp"});
    daemon.client().post::<ServiceView>("/v1/services", &spec).unwrap();
    let path = daemon.socket();
    let directory = daemon.stop();
    assert!(!path.exists());
    let daemon = TestDaemon::start_in(directory, WEB);
    assert_eq!(daemon.dataplane.names(), ["dns", "web"]);
    assert_eq!(daemon.dataplane.lock().applies, 1);
}

#[test]
fn a_second_daemon_on_a_live_socket_is_refused() {
    let daemon = TestDaemon::start("");
    let error = socket::Socket::check(&daemon.socket()).unwrap_err().to_string();
    assert!(error.starts_with("another netlb runs here"), "{error}");
}

#[test]
fn a_conflict_shows_in_status_and_ends_when_the_holder_goes() {
    let daemon = TestDaemon::start("");
    let spec = serde_json::json!({"name": "api", "frontend": "10.96.0.1:80/tcp"});
    daemon.client().post::<ServiceView>("/v1/services", &spec).unwrap();
    daemon.write_config(WEB);
    wait_until(|| !status(&daemon).conflicts.is_empty());
    let conflict = status(&daemon).conflicts.remove(0);
    assert_eq!((conflict.service.as_str(), conflict.held_by.as_str()), ("web", "api"));
    daemon.client().delete::<()>("/v1/services/api").unwrap();
    wait_until(|| status(&daemon).conflicts.is_empty());
    assert_eq!(daemon.dataplane.names(), ["web"]);
}

#[test]
fn stopping_waits_no_longer_than_the_grace_for_an_idle_connection() {
    let daemon = TestDaemon::start("");
    let _idle = std::os::unix::net::UnixStream::connect(daemon.socket()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let start = std::time::Instant::now();
    daemon.stop();
    assert!(start.elapsed() < Duration::from_secs(8));
}
