use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::*;
use crate::{daemon::lock::Locks, testing::TestDaemon};

const CONFIG: &str = "[[service]]\nname = \"file\"\nfrontend = \"10.96.9.9:80/tcp\"\nbackends = [\"10.244.9.9:80\"]\n";

struct Ran {
    exit: ExitCode,
    out: String,
    err: String,
}

fn run_at(socket: &Path, line: &str) -> Ran {
    let socket = socket.to_str().unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let arguments = ["netlb"].into_iter().chain(line.split_whitespace()).chain(["--socket", socket]);
    let exit = run(arguments, &mut out, &mut err);
    Ran { exit, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

fn netlb(daemon: &TestDaemon, line: &str) -> Ran {
    run_at(&daemon.socket(), line)
}

/// What a command that has to succeed printed.
fn ok(daemon: &TestDaemon, line: &str) -> String {
    let Ran { exit, out, err } = netlb(daemon, line);
    assert_eq!((exit, err.as_str()), (ExitCode::Ok, ""), "{line}");
    out
}

#[test]
fn the_command_line_is_well_formed() {
    use clap::CommandFactory as _;
    Cli::command().debug_assert();
}

#[test]
fn help_documents_the_exit_codes() {
    let Ran { exit, out, .. } = run_at(Path::new("/none"), "--help");
    assert_eq!(exit, ExitCode::Ok);
    assert!(out.contains("  3  the daemon cannot be reached"), "{out}");
}

#[test]
fn a_service_is_added_listed_shown_changed_and_removed() {
    let daemon = TestDaemon::start(CONFIG);
    let added = ok(
        &daemon,
        "svc add 10.96.0.1:80/tcp --name default/web --backend 10.244.0.1:8080 --backend 10.244.0.2:8080=2 --frontend 10.96.0.1:443/tcp",
    );
    assert_eq!(added, "service default/web created (2 backends)\n");
    daemon.dataplane.add_flow("default/web", "192.0.2.1:5000", "10.244.0.2:8080");
    assert_eq!(
        ok(&daemon, "svc list"),
        "\
NAME         FRONTENDS                          ALGORITHM  BACKENDS  FLOWS  PACKETS  BYTES  OWNER
default/web  10.96.0.1:80/tcp,10.96.0.1:443/tcp  maglev          2/2      1       11   1001  api
file         10.96.9.9:80/tcp                    maglev          1/1      0        0      0  file
"
        .replace("FRONTENDS                          ALG", "FRONTENDS                           ALG")
    );
    assert_eq!(ok(&daemon, "service ls -o name"), "default/web\nfile\n");
    assert!(!ok(&daemon, "svc list --no-headers").contains("NAME"));
    assert!(ok(&daemon, "svc list -o wide").contains("BYTES-OUT"));
    assert_eq!(
        ok(&daemon, "svc show 10.96.0.1:443/tcp"),
        "\
default/web  10.96.0.1:80/tcp,10.96.0.1:443/tcp  maglev  snat auto  owner api  1 flows of 1  in 10 packets 1000 bytes  out 1 packets 1 bytes
  BACKEND          WEIGHT  STATE   ACTIVE  FLOWS
  10.244.0.1:8080       1  active       0      0
  10.244.0.2:8080       2  active       1      1
"
    );
    assert_eq!(ok(&daemon, "svc set default/web --algorithm random"), "service default/web changed\n");
    assert_eq!(ok(&daemon, "svc delete default/web"), "service default/web removed\n");
    assert_eq!(daemon.dataplane.names(), ["file"]);
}

#[test]
fn the_mode_is_chosen_and_shown() {
    let daemon = TestDaemon::start(CONFIG);
    ok(&daemon, "svc add 10.96.0.1:80/tcp --name web --backend 10.244.0.1:80 --mode dsr");
    assert!(ok(&daemon, "svc show web").contains("\n  mode: dsr\n"));
    let shown = || serde_json::from_str::<Value>(&ok(&daemon, "svc show web -o json")).unwrap()["mode"].clone();
    ok(&daemon, "svc set web --algorithm random");
    assert_eq!(shown(), "dsr", "still");
    ok(&daemon, "svc set web --mode nat");
    assert_eq!(shown(), "nat");
    assert!(!ok(&daemon, "svc show web").contains("mode:"));
}

#[test]
fn how_clients_get_an_address_of_the_node_is_chosen_and_shown() {
    let daemon = TestDaemon::start(CONFIG);
    ok(&daemon, "svc add 10.96.0.1:80/tcp --name web --backend 10.244.0.1:80 --snat always");
    assert!(ok(&daemon, "svc show web").contains("  maglev  snat always  owner api  "));
    let wide = ok(&daemon, "svc list -o wide");
    let columns: Vec<Vec<_>> = wide.lines().map(|line| line.split_whitespace().skip(2).take(7).collect()).collect();
    assert_eq!(
        columns,
        [
            ["ALGORITHM", "SNAT", "MODE", "AFFINITY", "EXTERNAL", "INTERNAL", "BACKENDS"],
            ["maglev", "auto", "nat", "none", "cluster", "cluster", "1/1"],
            ["maglev", "always", "nat", "none", "cluster", "cluster", "1/1"]
        ],
        "{wide}"
    );
    ok(&daemon, "backend add web 10.244.0.2:80");
    ok(&daemon, "svc set web --algorithm random");
    let shown = |format: &str| ok(&daemon, &format!("svc show web -o {format}"));
    assert_eq!(serde_json::from_str::<Value>(&shown("json")).unwrap()["snat"], "always", "still");
    assert_eq!(ok(&daemon, "svc set web --snat never"), "service web changed\n");
    assert!(shown("yaml").contains("\nsnat: never\n"));

    let file = daemon.directory.path().join("services.toml");
    let text = "[[service]]\nname = \"web\"\nfrontend = \"10.96.0.1:80/tcp\"\nsnat = \"always\"\n";
    let apply = format!("apply -f {}", file.display());
    std::fs::write(&file, text).unwrap();
    assert!(ok(&daemon, &apply).starts_with("service web updated\n"));
    assert_eq!(serde_json::from_str::<Value>(&shown("json")).unwrap()["snat"], "always");
    std::fs::write(&file, text.replace("always", "auto")).unwrap();
    assert!(ok(&daemon, &apply).starts_with("service web updated\n"), "for this alone");
}

#[test]
fn every_way_to_a_service_is_added_shown_changed_and_emptied() {
    let daemon = TestDaemon::start("");
    let added = ok(
        &daemon,
        "svc add 10.96.0.1:80/tcp --name web --backend 10.244.0.1:80 --external-ip 192.0.2.1 --external-ip 192.0.2.2:8080/tcp \
         --lb-ip 203.0.113.1 --source-range 198.51.100.0/24 --source-range 198.51.101.7 --node-port 30080 --node-port 30081/udp \
         -p 192.0.2.3:8080:80 --publish 8081:80/udp --external-traffic-policy Local --internal-traffic-policy local \
         --affinity client-ip:60",
    );
    assert_eq!(added, "service web created (1 backend)\n");
    let shown = "\
web  10.96.0.1:80/tcp  maglev  snat auto  owner api  0 flows of 0  in 0 packets 0 bytes  out 0 packets 0 bytes
  external IPs: 192.0.2.1:80/tcp,192.0.2.2:8080/tcp
  load balancer IPs: 203.0.113.1:80/tcp
  source ranges: 198.51.100.0/24,198.51.101.7/32
  node ports: 30080/tcp,30081/udp
  published: 192.0.2.3:8080:80/tcp,8081:80/udp
  external traffic: local
  internal traffic: local
  affinity: client-ip:60
  BACKEND        WEIGHT  STATE   ACTIVE  FLOWS
  10.244.0.1:80       1  active       0      0
";
    for reference in ["web", "0.0.0.0:30080/tcp", "0.0.0.0:8081/udp", "192.0.2.3:8080/tcp", "203.0.113.1:80/tcp"] {
        assert_eq!(ok(&daemon, &format!("svc show {reference}")), shown, "{reference}");
    }
    let listed = ok(&daemon, "svc list -o wide");
    let ways = "10.96.0.1:80/tcp,192.0.2.1:80/tcp,192.0.2.2:8080/tcp,203.0.113.1:80/tcp,:30080/tcp,:30081/udp,\
                192.0.2.3:8080:80/tcp,8081:80/udp";
    assert!(
        listed.contains(&format!("web   {ways}  maglev     auto  nat   client-ip:60  local     local")),
        "{listed}"
    );
    let all = "svc set web --external-ip none --lb-ip none --source-range none --node-port none -p none --affinity none \
               --external-traffic-policy cluster --internal-traffic-policy cluster --backend none";
    assert_eq!(ok(&daemon, all), "service web changed\n");
    let plain = ok(&daemon, "svc show web");
    assert_eq!(plain.lines().skip(1).collect::<Vec<_>>(), ["  no backends"], "{plain}");
    assert_eq!(ok(&daemon, "svc set web --node-port 30082 --frontend none"), "service web changed\n");
    assert!(ok(&daemon, "svc show web").contains("web  -  maglev"));
    assert!(ok(&daemon, "svc list").contains("web   :30082/tcp  maglev"));
}

#[test]
fn a_service_needs_some_way_to_it_and_not_a_vip() {
    let daemon = TestDaemon::start("");
    for (line, name) in [
        ("--node-port 30080", "0.0.0.0:30080/tcp"),
        ("-p 8080:80 -b 10.0.0.1", "0.0.0.0:8080/tcp"),
        ("-p [2001:db8::1]:8080:80 -b fd00::1=2", "[2001:db8::1]:8080/tcp"),
        ("--external-ip 192.0.2.1:80/tcp", "192.0.2.1:80/tcp"),
        ("--load-balancer-ip 203.0.113.1:80/tcp", "203.0.113.1:80/tcp"),
        ("--frontend 10.96.0.1:80/tcp", "10.96.0.1:80/tcp"),
    ] {
        assert_eq!(ok(&daemon, &format!("svc add {line} -o name")), format!("{name}\n"), "{line}");
        assert!(ok(&daemon, &format!("svc show {name}")).starts_with(name), "{line}");
    }
    assert_eq!(
        ok(&daemon, "backend add 0.0.0.0:8080/tcp 10.0.0.2 --weight 3"),
        "0.0.0.0:8080/tcp: backend 10.0.0.2:80 added (weight 3)\n"
    );
    let Ran { exit, err, .. } = netlb(&daemon, "svc add --backend 10.0.0.1:80");
    assert_eq!(exit, ExitCode::Usage);
    for way in ["VIP", "--node-port", "--publish", "--external-ip", "--lb-ip"] {
        assert!(err.contains(way), "{err}");
    }
}

#[test]
fn backends_show_conditions_and_places_where_there_are_any() {
    let daemon = TestDaemon::start("");
    ok(&daemon, "svc add 10.96.0.1:80/tcp --name web --backend 10.0.0.1:80");
    ok(&daemon, "backend add web 10.0.0.2:80 --node a --zone east --hint-zone east --hint-zone west --hint-node a");
    ok(&daemon, "backend add web 10.0.0.3:80 --ready false --serving true --terminating true");
    assert_eq!(
        ok(&daemon, "backend list web"),
        "\
BACKEND      WEIGHT  STATE   CONDITIONS                     NODE  ZONE  HINTS                      ACTIVE  FLOWS
10.0.0.1:80       1  active  ready                          -     -     -                               0      0
10.0.0.2:80       1  active  ready                          a     east  node/a,zone/east,zone/west       0      0
10.0.0.3:80       1  active  not-ready,serving,terminating  -     -     -                               0      0
"
        .replace("HINTS                      ACTIVE", "HINTS                       ACTIVE")
        .replace("     -     -                               0", "     -     -                                0")
    );
    assert!(ok(&daemon, "svc list").contains(" 2/3 "));
    let changed = "backend set web 10.0.0.2:80 --weight 2 --ready false --node none --hint-node none --hint-zone none";
    assert_eq!(ok(&daemon, changed), "web: backend 10.0.0.2:80 changed\n");
    ok(&daemon, "backend rm web 10.0.0.3:80");
    assert_eq!(
        ok(&daemon, "backend list web --no-headers"),
        "10.0.0.1:80  1  active  ready      -     0  0\n10.0.0.2:80  2  active  not-ready  east  0  0\n"
    );
    let json: Value = serde_json::from_str(&ok(&daemon, "backend list web -o json")).unwrap();
    assert_eq!(json["items"][1]["serving"], false);
    ok(&daemon, "backend set web 10.0.0.2:80 --ready true --zone none");
    assert!(ok(&daemon, "backend list web").starts_with("BACKEND      WEIGHT  STATE   ACTIVE  FLOWS\n"));
}

#[test]
fn json_yaml_and_table_are_the_same_view() {
    let daemon = TestDaemon::start(CONFIG);
    let json: Value = serde_json::from_str(&ok(&daemon, "svc list -o json")).unwrap();
    assert_eq!(json["apiVersion"], "netlb/v1");
    assert_eq!(json["items"][0]["backends"][0]["address"], "10.244.9.9:80");
    let yaml = ok(&daemon, "svc list -o yaml");
    assert!(yaml.starts_with("apiVersion: netlb/v1\nitems:\n"), "{yaml}");
    assert!(yaml.contains("name: file"), "{yaml}");
    let created: Value = serde_json::from_str(&ok(&daemon, "svc add 10.96.0.1:80/tcp -o json")).unwrap();
    assert_eq!(created["name"], "10.96.0.1:80/tcp");
    assert_eq!(ok(&daemon, "svc add 10.96.0.2:80/tcp -o name"), "10.96.0.2:80/tcp\n");
    assert_eq!(ok(&daemon, "svc add 10.96.0.3:80/tcp -q"), "");
}

#[test]
fn backends_are_added_weighed_drained_and_removed() {
    let daemon = TestDaemon::start("");
    ok(&daemon, "svc add 10.96.0.1:80/tcp --name web");
    assert_eq!(
        ok(&daemon, "backend add web 10.244.0.1:80 --weight 5"),
        "web: backend 10.244.0.1:80 added (weight 5)\n"
    );
    assert_eq!(ok(&daemon, "backend set web 10.244.0.1:80 --weight 7"), "web: backend 10.244.0.1:80 has weight 7\n");
    daemon.dataplane.add_flow("web", "192.0.2.1:5000", "10.244.0.1:80");
    assert_eq!(ok(&daemon, "backend drain web 10.244.0.1:80"), "web: draining backend 10.244.0.1:80: 1 flows left\n");
    assert_eq!(
        ok(&daemon, "backend list web"),
        "BACKEND        WEIGHT  STATE     ACTIVE  FLOWS\n10.244.0.1:80       7  draining       1      1\n"
    );
    assert!(ok(&daemon, "svc list").contains(" 0/1 "));
    assert_eq!(ok(&daemon, "backend ready web 10.244.0.1:80"), "web: backend 10.244.0.1:80 takes new flows\n");
    assert_eq!(ok(&daemon, "backend rm web 10.244.0.1:80"), "web: backend 10.244.0.1:80 removed\n");
}

#[test]
fn drain_waits_for_the_last_flow_or_times_out_with_6() {
    let daemon = TestDaemon::start("");
    ok(&daemon, "svc add 10.96.0.1:80/tcp --name web --backend 10.244.0.1:80");
    daemon.dataplane.add_flow("web", "192.0.2.1:5000", "10.244.0.1:80");
    let Ran { exit, err, .. } = netlb(&daemon, "backend drain web 10.244.0.1:80 --wait=300ms");
    assert_eq!(exit, ExitCode::TimedOut);
    assert_eq!(
        err,
        "error: backend 10.244.0.1:80 still has 1 flows after 300ms\n\
         hint: it goes on draining; `netlb backend ready web 10.244.0.1:80` takes that back\n"
    );
    let dataplane = daemon.dataplane.clone();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        dataplane.lock().flows.clear();
    });
    let out = ok(&daemon, "backend drain web 10.244.0.1:80 --wait");
    ends.join().unwrap();
    assert!(out.starts_with("web: draining backend 10.244.0.1:80: 1 flows left\n"), "{out}");
    assert!(out.contains("web: backend 10.244.0.1:80 drained after "), "{out}");
}

#[test]
fn flows_are_listed_counted_and_flushed() {
    let daemon = TestDaemon::start(CONFIG);
    daemon.dataplane.add_flow("file", "192.0.2.1:5000", "10.244.9.9:80");
    assert_eq!(
        ok(&daemon, "flows list --service file"),
        "\
SERVICE  CLIENT          FRONTEND          BACKEND        STATE        IDLE
file     192.0.2.1:5000  10.96.9.9:80/tcp  10.244.9.9:80  established    3s
"
    );
    daemon.dataplane.add_masqueraded("10.244.1.9:5353", "192.0.2.7:61000");
    assert_eq!(
        ok(&daemon, "flows list"),
        "\
SERVICE        CLIENT           SOURCE               FRONTEND          BACKEND        STATE          IDLE
file           192.0.2.1:5000   -                    10.96.9.9:80/tcp  10.244.9.9:80  established      3s
(masqueraded)  10.244.1.9:5353  192.0.2.7:61000/udp  -                 -              udp-both-ways    5s
"
    );
    let names = "192.0.2.1:5000 10.96.9.9:80/tcp\n10.244.1.9:5353 192.0.2.7:61000/udp\n";
    assert_eq!(ok(&daemon, "flows list -o name"), names);
    assert_eq!(ok(&daemon, "flows count"), "2\n");
    assert_eq!(ok(&daemon, "flows count --service file"), "1\n");
    assert_eq!(ok(&daemon, "flows flush --service 10.96.9.9:80/tcp"), "1 flows removed\n");
    assert_eq!(ok(&daemon, "flows count -o json"), "{\n  \"count\": 1\n}\n");
}

#[test]
fn status_tells_what_an_operator_looks_for() {
    let daemon = TestDaemon::start(CONFIG);
    let text = ok(&daemon, "status");
    assert!(text.contains("node          here (zone near)\nnode ports    192.0.2.1\nservices "), "{text}");
    for line in [
        "services      1\n",
        "kernel memory 1.0MB\n",
        "flow table    50 of 200 entries (25.0 %)\n",
        "  eth1      2  uplink  -     no such device\n",
        "  translated  7  packets: translated\n",
        "  uplinks: `eth9` matches no interface\n",
    ] {
        assert!(text.contains(line), "{line:?} in\n{text}");
    }
    assert!(!text.contains("no_backend"), "counters at zero are for -o wide");
    assert!(ok(&daemon, "status -o wide").contains("no_backend"));
}

#[test]
fn a_file_is_applied_in_one_transaction() {
    let daemon = TestDaemon::start(CONFIG);
    let file = daemon.directory.path().join("services.toml");
    std::fs::write(&file, "[[service]]\nname = \"a\"\nfrontend = \"10.96.0.1:80/tcp\"\n").unwrap();
    let file = file.display();
    assert_eq!(
        ok(&daemon, &format!("apply -f {file} --dry-run")),
        "service a created (dry run)\n1 created, 0 updated, 0 unchanged, 0 removed (dry run)\n"
    );
    assert_eq!(
        ok(&daemon, &format!("apply -f {file}")),
        "service a created\n1 created, 0 updated, 0 unchanged, 0 removed\n"
    );
    std::fs::write(file.to_string(), "[]").unwrap();
    assert_eq!(
        ok(&daemon, &format!("apply -f {file} --prune")),
        "service a removed\n0 created, 0 updated, 0 unchanged, 1 removed\n"
    );
    std::fs::write(file.to_string(), "[[service]]\nnam = 1\n").unwrap();
    let Ran { exit, err, .. } = netlb(&daemon, &format!("apply -f {file}"));
    assert_eq!(exit, ExitCode::Failed);
    assert!(err.contains("services.toml:2:1: unknown field `nam`"), "{err}");
    assert!(err.contains("  = help: did you mean `name`?"), "{err}");
}

#[test]
fn every_kind_of_failure_has_its_exit_code_and_hint() {
    let daemon = TestDaemon::start(CONFIG);
    ok(&daemon, "svc add 10.96.0.1:80/tcp --name web");
    ok(&daemon, "svc add --node-port 30080 --name holder");
    daemon.dataplane.fill_up("full");
    for (line, exit, message, hint) in [
        ("svc show wbe", ExitCode::NotFound, "service wbe not found", "nearest is web; `netlb svc list` shows all"),
        (
            "svc rm file",
            ExitCode::Conflict,
            "service file is declared by the file and",
            "change the configuration file",
        ),
        (
            "svc add 10.96.9.9:80/tcp",
            ExitCode::Conflict,
            "frontend 10.96.9.9:80/tcp belongs to service file",
            "change the conf",
        ),
        ("svc add 10.96.0.2:80/tcp --backend 10.96.0.2:80", ExitCode::Failed, "is its own frontend", ""),
        ("svc add 10.96.0.2:80/tcp --backend [fd00::1]:80", ExitCode::Failed, "mixes address families", ""),
        ("svc add 10.96.0.2:80/tcp --name full", ExitCode::Failed, "map BACKENDS is full (4 entries)", ""),
        ("svc add 10.96.0.2:80", ExitCode::Usage, "has no protocol; write ADDRESS:PORT/tcp", ""),
        ("svc add 10.96.0.2:0/tcp", ExitCode::Usage, "port 0", ""),
        ("svc add 10.96.0.2:80/tcp --backend 10.0.0.1:80=0", ExitCode::Usage, "weight 0 is not 1 to 1000", ""),
        ("svc add 10.96.0.2:80/tcp --backend 10.0.0.1:80=1001", ExitCode::Usage, "weight 1001 is not 1 to 1000", ""),
        ("backend set web 10.0.0.1:80 --weight 0", ExitCode::Usage, "weight 0 is not 1 to 1000", ""),
        ("backend set web 10.0.0.1:80 --weight 1", ExitCode::NotFound, "service web has no backend 10.0.0.1:80", ""),
        ("svc set web", ExitCode::Usage, "required", ""),
        ("svc set web --snat sometimes", ExitCode::Usage, "invalid value 'sometimes' for '--snat <SNAT>'", ""),
        ("svc set web --mode dsr --snat always", ExitCode::Failed, "has mode dsr, where backends see", ""),
        (
            "svc set web --node-port none --node-port 1",
            ExitCode::Usage,
            "--node-port is given `none` and",
            "`none` alone",
        ),
        ("svc add 10.96.0.2:80/tcp --node-port 0", ExitCode::Usage, "`0` is not PORT or PORT/PROTOCOL", ""),
        ("svc add -p 8080", ExitCode::Usage, "`8080` is not [ADDRESS:]PORT:TARGET[/PROTOCOL]", ""),
        ("svc add -p 8080:80 -b 10.0.0.1:81", ExitCode::Failed, "but backend 10.0.0.1:81 has another", ""),
        ("svc add 10.96.0.2:80/tcp -b 10.0.0.1", ExitCode::Failed, "write 10.0.0.1:PORT", ""),
        ("svc add --node-port 1 --lb-ip 192.0.2.1", ExitCode::Failed, "write 192.0.2.1:PORT/PROTOCOL", ""),
        (
            "svc set web --source-range 10.0.0.0/8",
            ExitCode::Failed,
            "has source ranges and no load-balancer address",
            "",
        ),
        ("svc set web --source-range 10.0.0.1/8", ExitCode::Usage, "write 10.0.0.0/8 for the network", ""),
        ("svc set web --affinity cookie", ExitCode::Usage, "affinity `cookie` is not none, client-ip", ""),
        ("svc set web --external-traffic-policy far", ExitCode::Usage, "possible values: cluster, local", ""),
        (
            "svc set web --node-port 30080/tcp",
            ExitCode::Conflict,
            "port 30080/tcp on the node's IPv4 addresses belongs to",
            "see `netlb svc show holder`",
        ),
        ("backend set web 10.0.0.1:80", ExitCode::Usage, "required", ""),
        ("backend set web 10.0.0.1:80 --ready maybe", ExitCode::Usage, "invalid value 'maybe'", ""),
        ("flows count --service nobody", ExitCode::NotFound, "service nobody not found", "`netlb svc list` shows all"),
        ("apply -f /none.toml", ExitCode::Failed, "cannot read /none.toml: No such file", ""),
        ("nonsense", ExitCode::Usage, "unrecognized subcommand", ""),
    ] {
        let ran = netlb(&daemon, line);
        assert_eq!((ran.exit, ran.out.as_str()), (exit, ""), "{line}: {}", ran.err);
        assert!(ran.err.starts_with("error: ") && ran.err.contains(message), "{line}: {}", ran.err);
        assert!(hint.is_empty() || ran.err.contains(&format!("\nhint: {hint}")), "{line}: {}", ran.err);
    }
    assert_eq!(daemon.dataplane.names(), ["file", "holder", "web"]);
}

#[test]
fn a_file_that_is_too_large_for_one_request_is_refused() {
    let daemon = TestDaemon::start("");
    let file = daemon.directory.path().join("large.json");
    let name = "x".repeat(crate::api::BODY_LIMIT);
    std::fs::write(&file, format!(r#"[{{"name":"{name}","frontend":"10.96.0.1:80/tcp"}}]"#)).unwrap();
    let Ran { exit, err, .. } = netlb(&daemon, &format!("apply -f {}", file.display()));
    assert_eq!(exit, ExitCode::Failed);
    assert_eq!(err, "error: the request body is larger than 16 MiB\nhint: send it in parts\n");
}

#[test]
fn errors_are_json_where_output_is() {
    let daemon = TestDaemon::start("");
    let Ran { out, err, .. } = netlb(&daemon, "svc show web -o json");
    assert_eq!(out, "");
    let error: Value = serde_json::from_str(&err).unwrap();
    assert_eq!(error["error"]["code"], "not_found");
    assert_eq!(error["error"]["message"], "service web not found");
}

#[test]
fn a_daemon_that_does_not_run_is_3() {
    let Ran { exit, err, .. } = run_at(Path::new("/nowhere/netlb.sock"), "svc list");
    assert_eq!(exit, ExitCode::Unreachable);
    assert_eq!(
        err,
        "error: cannot reach netlb at /nowhere/netlb.sock: no such file\n\
         hint: is the daemon running? `systemctl status netlb`, or set --socket\n"
    );
}

#[test]
fn a_closed_pipe_is_a_quiet_end() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let daemon = TestDaemon::start(CONFIG);
    for command in ["svc list", "completions bash", "--help", "svc list --watch"] {
        let mut err = Vec::new();
        let socket = daemon.socket();
        let arguments = ["netlb"].into_iter().chain(command.split(' ')).chain(["--socket", socket.to_str().unwrap()]);
        assert_eq!(run(arguments, &mut Closed, &mut err), ExitCode::Ok, "{command}");
        assert!(err.is_empty(), "{command}");
    }
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let Ran { exit, out, .. } = run_at(Path::new("/none"), &format!("completions {shell}"));
        assert_eq!(exit, ExitCode::Ok);
        assert!(out.contains("drain"), "{shell}");
    }
}

#[test]
fn cleanup_leaves_a_running_daemon_alone_and_what_is_no_bpffs() {
    let daemon = TestDaemon::start("");
    let directory = daemon.directory.path().display();
    let line = format!("cleanup --yes --bpffs {directory}/none --state-dir {directory}/state");
    let Ran { exit, err, .. } = netlb(&daemon, &line);
    assert_eq!(exit, ExitCode::Conflict, "{err}");
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("precious"), "").unwrap();
    let line = format!("cleanup --yes --bpffs {0} --state-dir {0}", files.path().display());
    let Ran { exit, err, .. } = run_at(&files.path().join("none"), &line);
    assert_eq!(exit, ExitCode::Failed);
    assert!(err.contains("is not on a BPF file system"), "{err}");
    assert!(files.path().join("precious").exists());
}

#[test]
fn cleanup_removes_a_stale_socket_and_keeps_the_services_unless_told() {
    let files = tempfile::tempdir().unwrap();
    let at = |name: &str| files.path().join(name);
    drop(std::os::unix::net::UnixListener::bind(at("sock")).unwrap());
    std::fs::write(at("services.json"), "{}").unwrap();
    let line = format!("cleanup --bpffs {0}/bpf --state-dir {0}", files.path().display());
    let out = run_at(&at("sock"), &format!("{line} --dry-run --state")).out;
    assert_eq!(out, format!("would remove {}\nwould remove {}\n", at("sock").display(), at("services.json").display()));
    assert!(at("sock").exists() && at("services.json").exists());
    let ran = run_at(&at("sock"), &format!("{line} --yes"));
    assert_eq!(ran.exit, ExitCode::Ok, "{}", ran.err);
    assert!(!at("sock").exists() && at("services.json").exists());
    run_at(&at("sock"), &format!("{line} --yes --state"));
    assert!(!at("services.json").exists());
    assert_eq!(run_at(&at("sock"), &format!("{line} --yes")).out, "nothing to remove\n");
}

#[test]
fn a_service_of_ports_may_be_given_a_family() {
    let daemon = TestDaemon::start("");
    ok(&daemon, "svc add -n p4 --node-port 30080");
    ok(&daemon, "svc add -n p6 --node-port 30080 --family ipv6");
    let family = |name: &str| {
        serde_json::from_str::<Value>(&ok(&daemon, &format!("svc show {name} -o json"))).unwrap()["family"].clone()
    };
    assert_eq!((family("p4"), family("p6")), (Value::Null, "ipv6".into()));
    assert!(ok(&daemon, "svc show p6").contains("\n  node ports: 30080/tcp\n  family: ipv6\n"));
    ok(&daemon, "svc add 10.96.0.1:80/tcp -n web -b 10.244.0.1:80 --family ipv4");
    assert_eq!(family("web"), Value::Null, "its address says it");
    let Ran { exit, err, .. } = netlb(&daemon, "svc add 10.96.0.2:80/tcp --family ipv6");
    assert_ne!(exit, ExitCode::Ok);
    assert!(err.contains("has family ipv6, and 10.96.0.2:80/tcp is of the other one"), "{err}");
}

/// A daemon that is started while a command writes.
struct Starting {
    directory: PathBuf,
    attempts: usize,
    started: bool,
}

impl Write for Starting {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.attempts += 1;
        self.started |= Locks::take(&self.directory, &self.directory.join("bpf")).is_ok();
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn no_daemon_starts_during_a_cleanup() {
    let files = tempfile::tempdir().unwrap();
    let socket = files.path().join("sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let line = format!("netlb cleanup --yes --bpffs {0}/bpf --state-dir {0} --socket {0}/sock", files.path().display());
    let mut out = Starting { directory: files.path().to_owned(), attempts: 0, started: false };
    assert_eq!(run(line.split(' '), &mut out, &mut Vec::new()), ExitCode::Ok);
    assert!(out.attempts > 0 && !out.started);
    assert!(!socket.exists());
    Locks::take(files.path(), &files.path().join("bpf")).unwrap();
}

#[test]
fn a_configuration_is_checked_without_a_daemon() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("netlb.toml");
    std::fs::write(&path, CONFIG).unwrap();
    let line = format!("run --check --config {}", path.display());
    assert_eq!(run_at(Path::new("/none"), &line).out, format!("{}: ok (1 services, 1 backends)\n", path.display()));
    std::fs::write(&path, "[nod]\n").unwrap();
    let Ran { exit, err, .. } = run_at(Path::new("/none"), &line);
    assert_eq!(exit, ExitCode::Failed);
    assert!(err.contains("netlb.toml:1:2: unknown field `nod`"), "{err}");
    assert!(err.contains("did you mean `node`?"), "{err}");
}
