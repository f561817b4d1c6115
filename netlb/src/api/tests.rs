use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use serde_json::{Value, json};

use super::*;
use crate::testing::TestDaemon;

const CONFIG: &str = "[[service]]\nname = \"file\"\nfrontend = \"10.96.9.9:80/tcp\"\nbackends = [\"10.244.9.9:80\"]\n";

/// A status and a body, from raw HTTP so that anything can be sent.
fn call(daemon: &TestDaemon, method: &str, path: &str, body: &str) -> (u16, Value) {
    call_as(daemon, method, path, "application/json", body)
}

fn call_as(daemon: &TestDaemon, method: &str, path: &str, content_type: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    // The server may answer and close before it has read a body it does not want.
    stream.write_all(body.as_bytes()).ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{method} {path}: {answer:?}"));
    let status = head[9..12].parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned())))
}

/// The error's code, with its status.
fn refused(daemon: &TestDaemon, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let (status, answer) = call(daemon, method, path, body);
    let text = |key: &str| answer["error"][key].as_str().unwrap_or_else(|| panic!("{status} {answer}")).to_owned();
    (status, text("code"), text("message"))
}

#[test]
fn a_service_is_created_shown_listed_changed_and_removed() {
    let daemon = TestDaemon::start(CONFIG);
    let spec = r#"{"name":"web","frontends":["10.96.0.1:80/tcp"],"backends":["10.244.0.1:80","10.244.0.2:80=2"]}"#;
    let (status, created) = call(&daemon, "POST", "/v1/services", spec);
    assert_eq!(status, 201);
    let backend = |address: &str, weight| json!({"address": address, "weight": weight, "state": "active", "ready": true, "serving": true, "terminating": false, "flows": 0, "activeFlows": 0});
    assert_eq!(
        created,
        json!({
            "name": "web", "frontends": ["10.96.0.1:80/tcp"], "externalIps": [], "loadBalancerIps": [], "nodePorts": [],
            "publish": [], "sourceRanges": [], "affinity": "none", "externalTrafficPolicy": "cluster",
            "internalTrafficPolicy": "cluster", "algorithm": "maglev", "snat": "auto", "mode": "nat", "owner": "api",
            "backends": [backend("10.244.0.1:80", 1), backend("10.244.0.2:80", 2)],
            "flows": 0, "activeFlows": 0, "packetsIn": 0, "bytesIn": 0, "packetsOut": 0, "bytesOut": 0,
        })
    );
    assert_eq!(call(&daemon, "GET", "/v1/services/web", ""), (200, created.clone()));
    assert_eq!(call(&daemon, "GET", "/v1/services/10.96.0.1:80%2Ftcp", ""), (200, created));
    let (_, list) = call(&daemon, "GET", "/v1/services", "");
    assert_eq!(list["apiVersion"], "netlb/v1");
    assert_eq!(list["items"].as_array().unwrap().iter().map(|item| &item["name"]).collect::<Vec<_>>(), ["file", "web"]);
    let (status, patched) = call(&daemon, "PATCH", "/v1/services/web", r#"{"algorithm":"round-robin"}"#);
    assert_eq!((status, &patched["algorithm"]), (200, &json!("round-robin")));
    let (status, patched) = call(&daemon, "PATCH", "/v1/services/web", r#"{"snat":"always"}"#);
    assert_eq!((status, &patched["snat"], &patched["algorithm"]), (200, &json!("always"), &json!("round-robin")));
    assert_eq!(call(&daemon, "GET", "/v1/services/web", ""), (200, patched.clone()));
    let (status, _, message) = refused(&daemon, "PATCH", "/v1/services/web", r#"{"snat":"sometimes"}"#);
    assert_eq!(status, 422);
    assert!(message.contains("unknown variant `sometimes`, expected one of `auto`, `always`, `never`"), "{message}");
    assert_eq!(patched["backends"].as_array().unwrap().len(), 2);
    let (status, put) = call(&daemon, "PUT", "/v1/services/web", r#"{"frontend":"10.96.0.1:80/tcp"}"#);
    assert_eq!((status, &put["algorithm"], &put["backends"]), (200, &json!("maglev"), &json!([])));
    assert_eq!(put["snat"], "auto", "what is not said is the default");
    let (status, new) = call(&daemon, "PUT", "/v1/services/new", r#"{"frontend":"10.96.0.2:80/tcp","snat":"never"}"#);
    assert_eq!((status, &new["snat"]), (201, &json!("never")));
    assert_eq!(call(&daemon, "DELETE", "/v1/services/web", "").0, 204);
    assert_eq!(daemon.dataplane.names(), ["file", "new"]);
}

#[test]
fn backends_are_added_shown_changed_and_removed() {
    let daemon = TestDaemon::start("");
    call(&daemon, "POST", "/v1/services", r#"{"name":"a/b","frontend":"[fd00::1]:53/udp"}"#);
    let path = "/v1/services/a%2Fb/backends";
    let one = "/v1/services/a%2Fb/backends/%5Bfd00::2%5D:53";
    let (status, added) = call(&daemon, "POST", path, r#"{"address":"[fd00::2]:53","weight":3}"#);
    assert_eq!((status, &added["weight"]), (201, &json!(3)));
    assert_eq!(call(&daemon, "POST", path, r#""[fd00::3]:53=4""#).1["weight"], 4, "the short form");
    assert_eq!(call(&daemon, "PATCH", one, r#"{"state":"draining"}"#).1["state"], "draining");
    assert_eq!(call(&daemon, "GET", one, "").1["weight"], 3);
    let (_, put) = call(&daemon, "PUT", one, "{}");
    assert_eq!((&put["weight"], &put["state"]), (&json!(1), &json!("active")));
    assert_eq!(call(&daemon, "GET", path, "").1["items"].as_array().unwrap().len(), 2);
    assert_eq!(call(&daemon, "DELETE", one, "").0, 204);
    assert_eq!(refused(&daemon, "GET", one, "").1, "not_found");
    assert_eq!(refused(&daemon, "DELETE", one, "").0, 404);
}

#[test]
fn every_way_to_a_service_is_written_shown_and_found() {
    let daemon = TestDaemon::start(CONFIG);
    let spec = r#"{"name":"web","frontend":"10.96.0.1:80/tcp","external_ips":["192.0.2.1"],"load_balancer_ips":["203.0.113.1:80/tcp"],
        "node_ports":[30080],"publish":["192.0.2.7:8080:80"],"source_ranges":["198.51.100.7"],"affinity":"client-ip",
        "external_traffic_policy":"Local","internal_traffic_policy":"local",
        "backends":["10.244.0.1",{"address":"10.244.0.2","node":"n","zone":"z","ready":false,"serving":true,"hints":{"zones":["z"]}}]}"#;
    let (status, created) = call(&daemon, "POST", "/v1/services", spec);
    assert_eq!(status, 201, "{created}");
    let parts = json!({
        "externalIps": ["192.0.2.1:80/tcp"], "loadBalancerIps": ["203.0.113.1:80/tcp"], "nodePorts": ["30080/tcp"],
        "publish": ["192.0.2.7:8080:80/tcp"], "sourceRanges": ["198.51.100.7/32"], "affinity": "client-ip:10800",
        "externalTrafficPolicy": "local", "internalTrafficPolicy": "local",
    });
    for (key, value) in parts.as_object().unwrap() {
        assert_eq!(created[key], *value, "{key}");
    }
    assert_eq!(
        created["backends"][1],
        json!({"address": "10.244.0.2:80", "weight": 1, "state": "active", "ready": false, "serving": true, "terminating": false,
               "node": "n", "zone": "z", "hints": {"zones": ["z"]}, "flows": 0, "activeFlows": 0})
    );
    for claim in ["192.0.2.1:80%2Ftcp", "203.0.113.1:80%2Ftcp", "0.0.0.0:30080%2Ftcp", "192.0.2.7:8080%2Ftcp"] {
        assert_eq!(call(&daemon, "GET", &format!("/v1/services/{claim}"), "").1["name"], "web", "{claim}");
    }
    let (status, code, message) = refused(&daemon, "POST", "/v1/services", r#"{"name":"site","publish":["8080:80"]}"#);
    assert_eq!((status, code.as_str()), (409, "conflict"));
    assert_eq!(message, "frontend 192.0.2.7:8080/tcp belongs to service web, declared by the api");
    let patch =
        r#"{"node_ports":["30081/udp"],"external_ips":[],"affinity":"none","external_traffic_policy":"cluster"}"#;
    let (status, patched) = call(&daemon, "PATCH", "/v1/services/0.0.0.0:30080%2Ftcp", patch);
    assert_eq!((status, &patched["nodePorts"], &patched["externalIps"]), (200, &json!(["30081/udp"]), &json!([])));
    assert_eq!((&patched["affinity"], &patched["publish"]), (&json!("none"), &json!(["192.0.2.7:8080:80/tcp"])));
    let port = r#"{"node_port":30090}"#;
    assert_eq!(call(&daemon, "PUT", "/v1/services/0.0.0.0:30090%2Ftcp", port).1["name"], "0.0.0.0:30090/tcp");
    assert_eq!(call(&daemon, "DELETE", "/v1/services/0.0.0.0:30090%2Ftcp", "").0, 204);
}

#[test]
fn a_backend_has_conditions_and_a_place() {
    let daemon = TestDaemon::start("");
    call(&daemon, "POST", "/v1/services", r#"{"name":"web","publish":["8080:80"]}"#);
    call(&daemon, "POST", "/v1/services", r#"{"name":"other","frontend":"10.96.0.2:80/tcp"}"#);
    let (status, added) = call(&daemon, "POST", "/v1/services/web/backends", r#"{"address":"10.0.0.1","node":"n"}"#);
    assert_eq!((status, &added["address"], &added["node"]), (201, &json!("10.0.0.1:80"), &json!("n")));
    let (status, _, message) = refused(&daemon, "POST", "/v1/services/other/backends", r#""10.0.0.1""#);
    assert_eq!(status, 422);
    assert_eq!(message, "service `other` publishes no port that backend 10.0.0.1 could have; write 10.0.0.1:PORT");
    let path = "/v1/services/web/backends/10.0.0.1:80";
    let (_, patched) =
        call(&daemon, "PATCH", path, r#"{"ready":false,"zone":"z","node":null,"hints":{"nodes":["m"]}}"#);
    assert_eq!((&patched["ready"], &patched["serving"]), (&json!(false), &json!(false)));
    assert_eq!(
        (&patched["node"], &patched["zone"], &patched["hints"]),
        (&Value::Null, &json!("z"), &json!({"nodes": ["m"]}))
    );
    let (_, put) = call(&daemon, "PUT", path, r#"{"terminating":true}"#);
    assert_eq!((&put["ready"], &put["terminating"], &put["zone"]), (&json!(true), &json!(true), &Value::Null));
    let (status, _, message) = refused(&daemon, "PATCH", path, r#"{"readi":true}"#);
    assert_eq!(status, 422);
    assert!(message.contains("unknown field `readi`"), "{message}");
}

#[test]
fn a_removed_backend_shows_while_it_has_flows() {
    let daemon = TestDaemon::start(CONFIG);
    daemon.dataplane.add_flow("file", "192.0.2.1:5000", "10.244.9.8:80");
    let (_, service) = call(&daemon, "GET", "/v1/services/file", "");
    assert_eq!(service["backends"][1]["state"], "removed");
    assert_eq!(service["activeFlows"], 1);
}

#[test]
fn flows_are_listed_counted_and_flushed() {
    let daemon = TestDaemon::start(CONFIG);
    for port in 1..=3 {
        daemon.dataplane.add_flow("file", &format!("192.0.2.1:{port}"), "10.244.9.9:80");
    }
    let (_, list) = call(&daemon, "GET", "/v1/flows?service=file&limit=2", "");
    assert_eq!(
        list["items"][0],
        json!({"service": "file", "client": "192.0.2.1:1", "frontend": "10.96.9.9:80/tcp", "backend": "10.244.9.9:80",
               "protocol": "tcp", "masqueraded": false, "state": "established", "idleSeconds": 3})
    );
    assert_eq!(list["items"].as_array().unwrap().len(), 2);
    assert_eq!(call(&daemon, "GET", "/v1/flows/count", ""), (200, json!({"count": 3})));
    assert_eq!(call(&daemon, "DELETE", "/v1/flows?service=10.96.9.9:80%2Ftcp", ""), (200, json!({"count": 3})));
    assert_eq!(call(&daemon, "GET", "/v1/flows/count?service=file", ""), (200, json!({"count": 0})));
    daemon.dataplane.add_masqueraded("10.244.1.9:5353", "192.0.2.7:61000");
    let masqueraded = json!({"client": "10.244.1.9:5353", "protocol": "udp", "source": "192.0.2.7:61000",
                             "masqueraded": true, "state": "udp-both-ways", "idleSeconds": 5});
    assert_eq!(call(&daemon, "GET", "/v1/flows", "").1["items"], json!([masqueraded]));
    assert_eq!(refused(&daemon, "GET", "/v1/flows?service=flie", "").0, 404);
    assert_eq!(refused(&daemon, "GET", "/v1/flows?limit=many", "").0, 400);
    assert_eq!(refused(&daemon, "DELETE", "/v1/flows?srevice=file", "").0, 400, "a typo does not flush everything");
}

#[test]
fn a_list_of_services_is_applied_as_a_whole() {
    let daemon = TestDaemon::start(CONFIG);
    let two = r#"{"services":[{"name":"a","frontend":"10.96.0.1:80/tcp"},{"name":"b","frontend":"10.96.0.2:80/tcp"}]}"#;
    let (_, dry) = call(&daemon, "POST", "/v1/apply?dryRun=true", two);
    assert_eq!((&dry["dryRun"], &dry["created"]), (&json!(true), &json!(["a", "b"])));
    assert_eq!(daemon.dataplane.names(), ["file"]);
    call(&daemon, "POST", "/v1/apply", two);
    assert_eq!(daemon.dataplane.names(), ["a", "b", "file"]);
    let one = r#"{"services":[{"name":"b","frontend":"10.96.0.2:80/tcp"}]}"#;
    let (_, pruned) = call(&daemon, "POST", "/v1/apply?prune=true", one);
    assert_eq!((&pruned["removed"], &pruned["unchanged"]), (&json!(["a"]), &json!(["b"])));
    assert_eq!(daemon.dataplane.names(), ["b", "file"], "services of the file are not pruned");
    let bad = r#"{"services":[{"name":"c","frontend":"10.96.0.3:80/tcp"},{"name":"d","frontend":"10.96.9.9:80/tcp"}]}"#;
    assert_eq!(refused(&daemon, "POST", "/v1/apply", bad).1, "conflict");
    let bad = r#"{"services":[{"name":"c","frontend":"10.96.0.3:80/tcp"},{"name":"d"}]}"#;
    let (status, _, message) = refused(&daemon, "POST", "/v1/apply", bad);
    assert_eq!((status, &message[..12]), (422, "services[1]:"));
    assert_eq!(daemon.dataplane.names(), ["b", "file"]);
}

#[test]
fn bad_services_are_refused_with_their_reason_and_change_nothing() {
    let daemon = TestDaemon::start(CONFIG);
    call(&daemon, "POST", "/v1/services", r#"{"name":"web","frontend":"10.96.0.1:80/tcp"}"#);
    let applies = daemon.dataplane.lock().applies;
    for (body, status, code, message) in [
        (
            r#"{"name":"x","frontend":"10.96.9.9:80/tcp"}"#,
            409,
            "conflict",
            "belongs to service file, declared by the file",
        ),
        (
            r#"{"name":"x","frontend":"10.96.0.1:80/tcp"}"#,
            409,
            "conflict",
            "belongs to service web, declared by the api",
        ),
        (r#"{"name":"web","frontend":"10.96.0.2:80/tcp"}"#, 409, "conflict", "service web exists already"),
        (r#"{"frontends":["10.96.0.2:80/tcp","[fd00::1]:80/tcp"]}"#, 422, "invalid", "mixes address families"),
        (r#"{"frontend":"10.96.0.2:80/tcp","backends":["[fd00::1]:80"]}"#, 422, "invalid", "mixes address families"),
        (r#"{"frontend":"10.96.0.2:0/tcp"}"#, 422, "invalid", "port 0"),
        (r#"{"frontend":"10.96.0.2:80/tcp","backends":["10.0.0.1:0"]}"#, 422, "invalid", "port 0"),
        (r#"{"frontend":"10.96.0.2:80/tcp","backends":["10.0.0.1:1=0"]}"#, 422, "invalid", "weight 0 is not 1 to 1000"),
        (
            r#"{"frontend":"10.96.0.2:80/tcp","backends":[{"address":"10.0.0.1:1","weight":70000}]}"#,
            422,
            "invalid",
            "weight 70000 is not 1 to 1000",
        ),
        (r#"{"frontend":"10.96.0.2:80/tcp","backends":["10.96.0.2:80"]}"#, 422, "invalid", "is its own frontend"),
        (r#"{"frontend":"10.96.0.2:80/sctp"}"#, 422, "invalid", "not a protocol netlb balances"),
        (r#"{"frontend":"10.96.0.2:80/tcp","algoritm":"random"}"#, 422, "invalid", "unknown field `algoritm`"),
        ("{\n  \"name\": oops}", 400, "malformed", "line 2 column 11"),
        ("", 400, "malformed", "not JSON"),
    ] {
        let (got_status, got_code, got_message) = refused(&daemon, "POST", "/v1/services", body);
        assert_eq!((got_status, got_code.as_str()), (status, code), "{body}: {got_message}");
        assert!(got_message.contains(message), "{body}: {got_message}");
    }
    assert_eq!(daemon.dataplane.lock().applies, applies);
}

#[test]
fn services_of_the_file_are_not_changed_by_the_api() {
    let daemon = TestDaemon::start(CONFIG);
    for (method, path, body) in [
        ("PUT", "/v1/services/file", r#"{"frontend":"10.96.9.9:80/tcp"}"#),
        ("PATCH", "/v1/services/file", r#"{"algorithm":"random"}"#),
        ("DELETE", "/v1/services/10.96.9.9:80%2Ftcp", ""),
        ("POST", "/v1/services/file/backends", r#""10.0.0.1:1""#),
        ("PATCH", "/v1/services/file/backends/10.244.9.9:80", r#"{"state":"draining"}"#),
        ("DELETE", "/v1/services/file/backends/10.244.9.9:80", ""),
    ] {
        let (status, answer) = call(&daemon, method, path, body);
        assert_eq!((status, &answer["error"]["code"]), (409, &json!("owned")), "{method} {path}");
        assert!(answer["error"]["hint"].as_str().unwrap().contains("configuration file"));
    }
}

#[test]
fn a_full_map_is_a_503_with_the_option_to_raise() {
    let daemon = TestDaemon::start("");
    daemon.dataplane.fill_up("web");
    let (status, code, message) =
        refused(&daemon, "POST", "/v1/services", r#"{"name":"web","frontend":"10.96.0.1:80/tcp"}"#);
    assert_eq!((status, code.as_str()), (503, "map_full"));
    assert!(
        message.ends_with(
            "map BACKENDS is full (4 entries); raise `limits.backends` in the configuration file and restart netlb"
        ),
        "{message}"
    );
    assert_eq!(refused(&daemon, "GET", "/v1/services/web", "").0, 404);
}

#[test]
fn a_body_that_is_too_large_or_not_json_is_refused() {
    let daemon = TestDaemon::start("");
    let (status, code, message) = refused(&daemon, "POST", "/v1/apply", &" ".repeat(BODY_LIMIT + 1));
    assert_eq!((status, code.as_str(), message.as_str()), (413, "too_large", "the request body is larger than 16 MiB"));
    let (status, answer) = call_as(&daemon, "POST", "/v1/services", "text/plain", "{}");
    assert_eq!((status, &answer["error"]["code"]), (415, &json!("unsupported_media_type")));
}

#[test]
fn paths_and_methods_that_are_none_answer_in_the_same_shape() {
    let daemon = TestDaemon::start("");
    assert_eq!(refused(&daemon, "GET", "/v2/services", "").0, 404);
    assert_eq!(refused(&daemon, "DELETE", "/v1/services", "").0, 405);
    assert_eq!(refused(&daemon, "GET", "/v1/services/web/backends/nonsense", "").0, 400);
}

#[test]
fn status_and_probes_answer() {
    let daemon = TestDaemon::start(CONFIG);
    let (_, status) = call(&daemon, "GET", "/v1/status", "");
    assert_eq!(
        status["node"],
        json!({"name": "here", "zone": "near", "nodePortAddresses": ["192.0.2.1"], "snatAddresses": []})
    );
    assert_eq!(status["flowTable"]["entries"], 50);
    assert_eq!(status["services"], 1);
    assert_eq!(status["reload"]["ok"], true);
    assert_eq!(call(&daemon, "GET", "/healthz", ""), (200, json!("ok\n")));
    assert_eq!(call(&daemon, "GET", "/readyz", ""), (200, json!("ok\n")));
}

#[test]
fn the_document_is_openapi_3_1_and_describes_exactly_what_is_served() {
    let daemon = TestDaemon::start(CONFIG);
    let (_, document) = call(&daemon, "GET", "/openapi.json", "");
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
    assert_eq!(document["info"]["title"], "netlb");
    let methods = ["GET", "POST", "PUT", "PATCH", "DELETE"];
    let mut described = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in methods {
            let url = path.replace("{service}", "nobody").replace("{backend}", "10.0.0.1:1");
            // A refusal by the handler is an answer too; only the fallbacks tell that nothing is there.
            let (status, answer) = call(&daemon, method, &url, "");
            let code = answer["error"]["code"].as_str().unwrap_or("");
            let message = answer["error"]["message"].as_str().unwrap_or("");
            let served = status != 405 && !(code == "not_found" && message.starts_with("there is nothing"));
            assert_eq!(served, item.get(method.to_lowercase()).is_some(), "{method} {path}: {status} {answer}");
            if served {
                described.insert(format!("{method} {path}"));
            }
        }
    }
    let expected = [
        "DELETE /v1/flows",
        "DELETE /v1/services/{service}",
        "DELETE /v1/services/{service}/backends/{backend}",
        "GET /healthz",
        "GET /openapi.json",
        "GET /readyz",
        "GET /v1/flows",
        "GET /v1/flows/count",
        "GET /v1/services",
        "GET /v1/services/{service}",
        "GET /v1/services/{service}/backends",
        "GET /v1/services/{service}/backends/{backend}",
        "GET /v1/status",
        "PATCH /v1/services/{service}",
        "PATCH /v1/services/{service}/backends/{backend}",
        "POST /v1/apply",
        "POST /v1/services",
        "POST /v1/services/{service}/backends",
        "PUT /v1/services/{service}",
        "PUT /v1/services/{service}/backends/{backend}",
    ];
    assert_eq!(described.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    let schemas = &document["components"]["schemas"];
    for (schema, keys) in [
        (
            "ServiceSpec",
            "external_ips load_balancer_ips node_port node_ports publish source_ranges mode affinity external_traffic_policy",
        ),
        (
            "ServicePatch",
            "external_ips load_balancer_ips node_ports publish source_ranges mode affinity internal_traffic_policy",
        ),
        (
            "ServiceView",
            "externalIps loadBalancerIps nodePorts publish sourceRanges mode affinity externalTrafficPolicy",
        ),
        ("BackendSpec", "address ready serving terminating node zone hints"),
        ("BackendPatch", "ready serving terminating node zone hints"),
        ("BackendView", "ready serving terminating node zone hints"),
    ] {
        for key in keys.split(' ') {
            assert!(schemas[schema]["properties"].get(key).is_some(), "{schema}.{key}");
        }
    }
    assert_eq!(schemas["ServiceSpec"]["required"], json!(null), "{}", schemas["ServiceSpec"]);
    assert_eq!(schemas["BackendSpec"]["required"], json!(["address"]));
    // Every schema that is referred to is there.
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(document["components"]["schemas"].get(reference).is_some(), "{reference}");
    }
}
