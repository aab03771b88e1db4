//! Case `weighted-users`: two classes of users with the same demand, and a rule that half of the
//! subjects have.

use std::time::Duration;

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::load::{CaseLoad, run_all};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

/// Requests per second of a user of weight 1.
const RATE: f64 = 20.0;
const WEIGHT: f64 = 3.2;
const SUBJECTS: usize = 200;

const CONFIG: &str = r#"
[log]
access = "off"
[identity]
trusted_proxies = ["127.0.0.0/8"]
user = "header:x-user-id"
tier = "header:x-user-tier"
secret = "field-case-secret"
[tiers]
platinum = 3.2
[limits.user]
tier = "user"
rate = "20/s"
burst = 20
[limits.trial]
tier = "user"
rate = "1/h"
burst = 1
percent = 50
[limits.shadow]
tier = "user"
rate = "1/h"
burst = 1
mode = "shadow"
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "weighted"
match = { path = "/weighted/*" }
upstream = "origin"
limits = ["user"]
[[routes]]
name = "trial"
match = { path = "/trial/*" }
upstream = "origin"
limits = ["trial"]
[[routes]]
name = "shadow"
match = { path = "/shadow/*" }
upstream = "origin"
limits = ["shadow"]
"#;

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let seconds = context.pick(6, 60);
    let origin = ScriptedOrigin::start(|_| OriginAnswer::ok("ok\n").field("Cache-Control: no-store"));
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let gateway =
        CaseGateway::start(context, "weighted-users", &CONFIG.replace("@ORIGIN@", &origin.address.to_string()))?;
    let demand = WEIGHT * RATE * 1.5;
    let mut report = CaseReport::new(format!(
        "A user of class platinum (weight {WEIGHT}) and one of class standard each send {demand:.0} requests a second for \
         {seconds} s under a limit of {RATE:.0}/s for each user. {SUBJECTS} users then send two requests under a rule with \
         `percent = 50` and one in shadow mode, each with one token an hour."
    ));
    let load = |class: &str| CaseLoad {
        fields: format!("x-user-id: {class}-user\r\nx-user-tier: {class}\r\n"),
        ..CaseLoad::new(gateway.address, "/weighted/a", (demand, Duration::from_secs(seconds)))
    };
    let reports = run_all(&[load("platinum"), load("standard")])?;
    let [platinum, standard] = [&reports[0], &reports[1]];
    // Both had their burst, of which the platinum user's is larger by the same factor.
    let ratio = platinum.good as f64 / standard.good.max(1) as f64;
    report.check(
        "platinum users are admitted 3.2 times as often (3.0 to 3.4)",
        (format!("{} and {} admitted: {ratio:.2} times", platinum.good, standard.good), (3.0..=3.4).contains(&ratio)),
    );
    let denied =
        |report: &crate::load::open_loop::OpenLoopReport| report.rejected as f64 / report.offered.max(1) as f64;
    let (of_platinum, of_standard) = (denied(platinum), denied(standard));
    report.check(
        "of the same demand, platinum users lose less than half of the part that standard users lose",
        (
            format!("{:.0} % and {:.0} % denied", 100.0 * of_platinum, 100.0 * of_standard),
            of_platinum < 0.5 * of_standard,
        ),
    );
    report.check(
        "a denied request is a 429, nothing else fails",
        (format!("{} others", platinum.failed + standard.failed), platinum.failed + standard.failed == 0),
    );
    trial(&gateway, &mut report)?;
    Ok(report)
}

/// The rule of a part of the subjects, and the one in shadow mode.
fn trial(gateway: &CaseGateway, report: &mut CaseReport) -> Result<()> {
    let mut client = gateway.client();
    let mut count_denied = |path: &str| -> Result<usize> {
        let mut denied = 0;
        for subject in 0..SUBJECTS {
            let fields = format!("x-user-id: subject-{subject}\r\n");
            for _ in 0..2 {
                let response =
                    client.get(path, &fields).map_err(LoadtestError::io(format!("the gateway at {path}")))?;
                denied += usize::from(response.status == 429);
            }
        }
        Ok(denied)
    };
    let (denied, in_shadow) = (count_denied("/trial/a")?, count_denied("/shadow/a")?);
    let share = 100.0 * denied as f64 / SUBJECTS as f64;
    report.check(
        "`percent = 50` denies the second request of 40 to 60 % of the subjects",
        (format!("{share:.0} %"), (40.0..=60.0).contains(&share)),
    );
    let holdout =
        gateway.metric("tidegate_limit_evaluations_total{rule=\"trial\",user_class=\"standard\",mode=\"holdout\"")?;
    let compared = holdout
        + gateway
            .metric("tidegate_limit_evaluations_total{rule=\"trial\",user_class=\"standard\",mode=\"enforced\"")?;
    report.check(
        "metrics count both arms",
        (
            format!("{holdout:.0} evaluations without and {:.0} with the rule", compared - holdout),
            holdout > 0.0 && compared > holdout,
        ),
    );
    let counted = gateway.metric(
        "tidegate_limit_evaluations_total{rule=\"shadow\",user_class=\"standard\",mode=\"shadow\",decision=\"denied\"}",
    )?;
    report.check(
        "shadow mode denies nothing and counts what it would deny",
        (format!("{in_shadow} denied, {counted:.0} counted"), in_shadow == 0 && counted as usize == SUBJECTS),
    );
    Ok(())
}
